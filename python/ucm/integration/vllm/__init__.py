"""UCM in vLLM. Importing this package does nothing else."""
