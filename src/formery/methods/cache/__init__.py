"""Methods that decide which keys and values are kept while decoding, and for how long."""
