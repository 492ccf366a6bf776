"""Benchmarks: throughput, training steps, plans, studies and the fault table; results of each in `results/`."""
