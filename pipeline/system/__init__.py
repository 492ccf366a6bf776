"""Shared by all packages: errors, logs, limits, files, devices, cores, random numbers, threads."""
