"""Keras optimizers. The only index: one line a public class."""

from .._backend import require_supported

require_supported()
