<<<<<<< HEAD
<<<<<<< HEAD
"""What the model remembers of the text: which keys and values there are, and which of them stay."""
=======
"""Methods that change what is remembered of the text: the keys and values."""
>>>>>>> sharing
=======
"""What the model remembers of the text: which keys and values there are, and which of them stay."""
>>>>>>> beyond
