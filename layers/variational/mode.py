"""What variational layers compute with where they predict: the mean, or K draws."""

import contextlib
import contextvars

import keras
from keras import ops

from ..ops.random import nth_seed, seed_pair

MEAN = "mean"


class Sampled:
    """A layer that computes as `mode` says: by means, or by K draws."""


def can_sample(model):
    """Returns whether a model or layer has layers of which draws can be had."""
    return any(isinstance(layer, Sampled) for layer in model._flatten_layers())


class Samples:
    """K draws of all weights, of which row n of a batch sees the one of n mod K.

    Args:
        count: K.
        seed: Pair of integers, from which every weight gets a seed of its own.
    """

    def __init__(self, count, seed):
        self.count = count
        self._seed, self._places = seed, {}

    def seed(self, weight):
        """The seed of a weight, the same however often it is drawn."""
        return nth_seed(self._seed, self._places.setdefault(weight, len(self._places)))

    def apply(self, function, x, *weights):
        """function(x, *weights), row n of x with the weights of draw n mod K.

        Args:
            function: From rows `[N, ...]` and one draw of the weights to rows.
            x: Tensor `[N K, ...]`.
            *weights: Tensors `[K, ...]`.
        """
        rows, *rest = ops.shape(x)
        x = ops.reshape(x, (rows // self.count, self.count, *rest))
        elements = (ops.moveaxis(x, 1, 0), *weights)
        y = ops.vectorized_map(lambda one: function(*one), elements)
        y = ops.moveaxis(y, 0, 1)
        return ops.reshape(y, (rows, *ops.shape(y)[2:]))

    def matmul(self, x, kernels):
        """x W, row n of x `[N K, ..., i]` with W of n mod K, of kernels `[K, i, o]`."""
        rows, *rest, _ = ops.shape(x)
        x = ops.reshape(x, (rows // self.count, self.count, *rest, x.shape[-1]))
        y = ops.einsum("nk...i,kio->nk...o", x, kernels)
        return ops.reshape(y, (rows, *rest, kernels.shape[-1]))


# None: each call draws, as the layer's estimator does. MEAN: nothing is drawn.
_MODE = contextvars.ContextVar("kzoo_variational_mode", default=None)


def mode():
    """What variational layers compute with now: None, MEAN or `Samples`."""
    return _MODE.get()


@contextlib.contextmanager
def _using(value):
    token = _MODE.set(value)
    try:
        yield
    finally:
        _MODE.reset(token)


def at_posterior_mean(function, *args, **kwargs):
    """Calls a function in which variational layers use their posteriors' means."""
    with _using(MEAN):
        return function(*args, **kwargs)


def at_posterior_samples(function, inputs, samples, seed):
    """Calls a function of a batch with K weights drawn from the posteriors.

    The function sees each row K times, one copy after the other.

    Args:
        function: From a batch `[B, ...]` to outputs `[B, ...]`, such as a model. It
            may repeat the whole batch, as `kzoo.layers.TileMembers` does, but not
            merge the batch's axis with one that comes after it.
        inputs: Its inputs, a tensor or a structure of tensors.
        samples: K, an integer or, on TensorFlow, a scalar tensor.
        seed: As `kzoo.layers.ops.random` takes it. Equal seeds, equal weights.

    Returns:
        Outputs `[B, K, ...]`.
    """

    def repeat(x):
        x = ops.convert_to_tensor(x)
        rows, *rest = ops.shape(x)
        x = ops.broadcast_to(ops.expand_dims(x, 1), (rows, samples, *rest))
        return ops.reshape(x, (rows * samples, *rest))

    def by_sample(y):
        if not len(y.shape):
            raise ValueError(
                "expected outputs [B, ...], whose rows can be told apart by sample. "
                "Received: a scalar"
            )
        rows, *rest = ops.shape(y)
        return ops.reshape(y, (rows // samples, samples, *rest))

    with _using(Samples(samples, seed_pair(seed))):
        outputs = function(keras.tree.map_structure(repeat, inputs))
    return keras.tree.map_structure(by_sample, outputs)
