"""Methods that decide which layers run."""
