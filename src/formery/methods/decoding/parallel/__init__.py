"""Many positions at once: decoding as the solution of a system of equations."""
