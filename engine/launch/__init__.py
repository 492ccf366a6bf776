"""Files that launch runs: Accelerate's configurations, a Slurm script and its helper."""
