"""Methods that decide how text is generated."""
