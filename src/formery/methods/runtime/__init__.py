"""How passes over a model are carried out: what is computed stays the same, how long it takes does not."""
