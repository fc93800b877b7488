"""What makes a model of the zoo a BatchEnsemble."""

from functools import partial

from ...layers import (
    Conv2DBatchEnsemble,
    DenseBatchEnsemble,
    batch_ensemble_initializer,
)
from ...layers.batch_ensemble.base import BatchEnsembleLayer
from ...layers.batch_ensemble.member_weights import MemberWeights


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


def check_members(model, ensemble_size):
    """Raises ValueError unless a model's layers have the members that it is for.

    Args:
        model: The model that factories have made the layers of.
        ensemble_size: M, the number of members of which the model tiles its inputs and
            averages its outputs; 1 for a single network.
    """
    kinds = (BatchEnsembleLayer, MemberWeights)
    layers = [x for x in model._flatten_layers() if isinstance(x, kinds)]
    sizes = {layer.ensemble_size for layer in layers} or {1}
    if sizes != {ensemble_size}:
        raise ValueError(
            "expected factories of layers with `ensemble_size` members. Received: "
            f"ensemble_size={ensemble_size}, and layers of {sorted(sizes)} members"
        )
