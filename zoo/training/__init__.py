"""Training and evaluation over plain `fit`."""
