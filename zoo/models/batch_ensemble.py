"""What makes a model of the zoo a BatchEnsemble."""

from functools import partial

from ...layers import (
    Conv2DBatchEnsemble,
    DenseBatchEnsemble,
    batch_ensemble_initializer,
)


def batch_ensemble(ensemble_size, fast_weights):
    """The arguments of an image model that make it a BatchEnsemble.

    Args:
        ensemble_size: M, the number of members.
        fast_weights: How their fast weights start, as
            `kzoo.layers.batch_ensemble_initializer` takes it.

    Returns:
        dict of the factories `conv` and `dense`, and `ensemble_size`.

    Example:

    >>> from kzoo.zoo.models.batch_ensemble import batch_ensemble
    >>> from kzoo.zoo.models.resnet import resnet
    >>> method = batch_ensemble(ensemble_size=4, fast_weights=-0.5)
    >>> model = resnet((8, 8, 1), classes=10, depth=8, **method)
    """
    method = {
        "ensemble_size": ensemble_size,
        "alpha_initializer": batch_ensemble_initializer(fast_weights),
        "gamma_initializer": batch_ensemble_initializer(fast_weights),
    }
    return {
        "conv": partial(Conv2DBatchEnsemble, **method),
        "dense": partial(DenseBatchEnsemble, **method),
        "ensemble_size": ensemble_size,
    }
