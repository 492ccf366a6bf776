"""Shared by the benchmarks: tables, machine, data paths, peers."""
