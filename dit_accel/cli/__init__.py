"""Every command line, and nothing else."""
