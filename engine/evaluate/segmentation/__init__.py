"""Semantic segmentation by an FCN."""
