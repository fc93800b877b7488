"""Where the weights of the zoo's Bayesian models start."""

import math

import keras

from ...layers import MeanFieldNormal
from ...layers.ops.arguments import positive


def normal_around(loc_initializer, stddev):
    """Normal posteriors that start around a plain layer's weights.

    Args:
        loc_initializer: Of the means, as a plain kernel's.
        stddev: Standard deviation of all weights where they start, above 0.

    Returns:
        `kzoo.layers.MeanFieldNormal`.

    Raises:
        ValueError: If `stddev` is not above 0.

    Example:

    >>> from kzoo.layers import DenseFlipout
    >>> from kzoo.zoo.models.posterior import normal_around
    >>> layer = DenseFlipout(3, kernel_posterior_fn=normal_around("he_normal", 0.05))
    """
    stddev = positive("stddev", stddev)
    return MeanFieldNormal(
        loc_initializer=loc_initializer,
        # softplus⁻¹(σ) = σ + log(1 - exp(-σ)).
        untransformed_scale_initializer=keras.initializers.Constant(
            stddev + math.log(-math.expm1(-stddev))
        ),
    )
