"""Embeddings: a table of rows that are picked."""

import keras
from keras import ops

from ..approximations.one_hot import (
    OneHotDiagonal,
    OneHotEigenvalueCorrected,
    OneHotKronecker,
)
from .base import CurvatureBlock, register_curvature_block


@register_curvature_block(keras.layers.Embedding)
class EmbeddingBlock(CurvatureBlock):
    """An Embedding: a is a row's number. A masked 0 is no position that counts."""

    approximations = {
        "kronecker": OneHotKronecker,
        "ekfac": OneHotEigenvalueCorrected,
        "diagonal": OneHotDiagonal,
    }

    def find_kernel(self, layer):
        """Returns the table."""
        return layer._embeddings

    def rows(self, inputs):
        """Returns the numbers, `[N, R, 1]`."""
        return ops.reshape(inputs, (ops.shape(inputs)[0], -1, 1))

    def weights(self, inputs, mask):
        """Returns 0 for a masked 0, else 1."""
        if not self.layer.mask_zero:
            return None
        return ops.cast(self.rows(inputs)[..., 0] != 0, "float32")
