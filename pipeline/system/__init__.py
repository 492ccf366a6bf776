"""Shared by all packages: errors, limits, files, devices, cores, random numbers, threads."""
