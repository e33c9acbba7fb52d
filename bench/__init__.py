"""Formery timed beside other people's programs, on the same weights and prompts, in one interleaved run."""
