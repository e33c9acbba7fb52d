"""Training beside other people's loops."""
