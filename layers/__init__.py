"""Keras layers. The only index: one line a public class."""

from .._backend import require_supported

require_supported()

# ruff: noqa: E402, F401
from .batch_ensemble.conv2d import Conv2DBatchEnsemble
from .batch_ensemble.dense import DenseBatchEnsemble
from .batch_ensemble.initializers import RandomSign, batch_ensemble_initializer
from .batch_ensemble.members import AverageMembers, TileMembers
