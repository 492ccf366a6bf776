"""Recipes of other libraries that start from an encoder of this project."""
