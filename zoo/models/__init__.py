"""Architectures; importing this package registers their models."""

from . import (
    attention_seq2seq,
    bottleneck_resnet,
    deep_ensemble,
    language_model,
    lenet,
    mimo,
    mlp,
    resnet,
    transformer,
    wide_resnet,
)

__all__ = [
    "attention_seq2seq",
    "bottleneck_resnet",
    "deep_ensemble",
    "language_model",
    "lenet",
    "mimo",
    "mlp",
    "resnet",
    "transformer",
    "wide_resnet",
]
