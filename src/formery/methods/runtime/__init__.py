"""Methods that compute the same faster, or on more machines: how the work is laid out and shared."""
