"""Throughput benchmarks; dated results stand in `results/`."""
