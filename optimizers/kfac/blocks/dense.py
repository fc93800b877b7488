"""Dense layers, at one position of an example or at many."""

import keras

from .base import CurvatureBlock, register_curvature_block


@register_curvature_block(keras.layers.Dense)
class DenseBlock(CurvatureBlock):
    """A Dense layer: its kernel multiplies the last axis as it is."""
