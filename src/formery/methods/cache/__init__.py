"""Methods that change what is remembered of the text: the keys and values."""
