"""Data sets through tensorflow-datasets."""

from .load import load
from .tasks import permute_pixels, split_classes

__all__ = ["load", "permute_pixels", "split_classes"]
