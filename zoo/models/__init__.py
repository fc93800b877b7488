"""Architectures; importing this package registers their models."""

from . import resnet

__all__ = ["resnet"]
