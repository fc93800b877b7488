"""Layers whose weights are drawn from a learned distribution."""
