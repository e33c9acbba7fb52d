"""Papers on attention: what stands in its place, and how far each layer looks."""
