"""Keras layers. The only index: one line a public class."""

from .._backend import require_supported

require_supported()

from .batch_ensemble.members import AverageMembers, TileMembers  # noqa: E402, F401
