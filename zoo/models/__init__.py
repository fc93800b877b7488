"""Architectures; importing this package registers their models."""

from . import lenet, mlp, resnet

__all__ = ["lenet", "mlp", "resnet"]
