"""How each shipped model was trained; run one with `formery train NAME`."""
