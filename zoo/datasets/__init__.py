"""Data sets through tensorflow-datasets."""

from .load import load

__all__ = ["load"]
