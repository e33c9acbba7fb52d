"""Papers that change what a model keeps of the text that it has read."""
