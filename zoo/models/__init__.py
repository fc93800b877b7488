"""Architectures; importing this package registers their models."""

from . import deep_ensemble, lenet, mimo, mlp, resnet, wide_resnet

__all__ = ["deep_ensemble", "lenet", "mimo", "mlp", "resnet", "wide_resnet"]
