"""Keras metrics of accuracy under uncertainty."""
