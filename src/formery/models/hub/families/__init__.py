"""One file a family of published models: names and shapes, nothing else."""
