"""What the model remembers of the text: which keys and values there are, and which of them stay."""
