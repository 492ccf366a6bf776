"""Augmentation: random draws, crop and resize, color, on the CPU and by Triton."""
