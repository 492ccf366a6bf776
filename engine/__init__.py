"""Training: settings, the loop, checkpoints, monitoring and evaluation, launched by Accelerate."""
