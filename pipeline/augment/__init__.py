"""Augmentation: random draws, crop and resize, color; compiled code on the CPU, Triton kernels on the GPU."""
