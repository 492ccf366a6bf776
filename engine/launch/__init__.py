"""What starts runs: configurations of Accelerate, a Slurm script and what it asks."""
