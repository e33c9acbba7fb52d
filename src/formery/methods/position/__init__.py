"""Methods that tell positions, or do without."""
