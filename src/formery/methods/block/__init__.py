"""Methods that change how a model is laid out: which vectors its layers run over, and how tokens come of them."""
