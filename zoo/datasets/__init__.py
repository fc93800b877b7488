"""Data sets through tensorflow-datasets."""

from .load import load
from .tasks import permute_pixels, split_classes
from .text_streams import text_streams

__all__ = ["load", "permute_pixels", "split_classes", "text_streams"]
