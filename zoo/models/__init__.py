"""Architectures; importing this package registers their models."""

from . import (
    bottleneck_resnet,
    deep_ensemble,
    lenet,
    mimo,
    mlp,
    resnet,
    transformer,
    wide_resnet,
)

__all__ = [
    "bottleneck_resnet",
    "deep_ensemble",
    "lenet",
    "mimo",
    "mlp",
    "resnet",
    "transformer",
    "wide_resnet",
]
