"""Architectures, one file each; layer factories are arguments."""
