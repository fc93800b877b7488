"""Dropout that stays on in prediction: Monte Carlo dropout."""

import warnings

import keras
from keras import ops

from ..conversion import converted
from ..ops import arguments
from ..ops.random import bernoulli
from ..seeded import SeededLayer
from .mode import Sampled, Samples, mode

SPATIAL = {
    keras.layers.SpatialDropout1D: 1,
    keras.layers.SpatialDropout2D: 2,
    keras.layers.SpatialDropout3D: 3,
}
# Other layers of noise, which stay as they are.
OTHERS = (
    keras.layers.AlphaDropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
)


@keras.saving.register_keras_serializable(package="kzoo")
class MonteCarloDropout(Sampled, SeededLayer):
    """Dropout whose masks can be drawn in prediction as well.

    With p the rate and z a mask of independent entries, 1 with probability 1 - p,

        y = x ∘ z / (1 - p)

    in training, with a mask for each row; in prediction y = x, as with
    `keras.layers.Dropout`. The mean over masks of what a network then predicts is an
    approximate Bayesian prediction: a mask picks which rows of the next kernel are
    left, a draw of the weights.

    So K draws are had as of any posterior: by `kzoo.layers.PosteriorSamples`, in one
    compiled call, by `kzoo.zoo.predictive.sampled_classification`, and by the signature
    `sampling` of what `kzoo.zoo.export` writes, with K and a seed for inputs. Draw k
    has one mask for all rows of a batch, and so is one network, independent of the
    other draws; each row's predictions are distributed as if its masks were its own.

    Takes `keras.layers.Dropout`'s arguments. `to_monte_carlo_dropout` puts it in the
    place of the dropout of a whole model.

    Reference: Gal, Ghahramani, "Dropout as a Bayesian Approximation: Representing Model
    Uncertainty in Deep Learning", 2016. https://arxiv.org/abs/1506.02142

    Args:
        rate: p, at least 0 and below 1.
        noise_shape: Shape of z, which is broadcast to the input's, as `(None, 1, None)`
            for one mask for all steps of a sequence; None in it stands for the input's
            size. In draws its first entry does not count.
        seed: Integer, or None.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: x; a mask passes through.
        training: Whether the batch is a training batch. Defaults to False.

    Input shape:
        `[B, ...]`.

    Output shape:
        The input's.

    Raises:
        ValueError: If `rate` is out of range, or `noise_shape` is no shape.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import MonteCarloDropout, PosteriorSamples
    >>> layers = [MonteCarloDropout(0.5), keras.layers.Dense(3)]
    >>> model = keras.Sequential([keras.Input((5,)), *layers])
    >>> y = PosteriorSamples(model, 16, seed=0).predict(np.ones((2, 5)), verbose=0)
    >>> y.shape, bool((y[0] == y[1]).all()), bool((y[0, 0] == y[0, 1]).all())
    ((2, 16, 3), True, False)
    """

    def __init__(self, rate, noise_shape=None, seed=None, **kwargs):
        super().__init__(seed=seed, **kwargs)
        self.rate = arguments.rate("rate", rate)
        self.noise_shape = None if noise_shape is None else tuple(noise_shape)
        for size in self.noise_shape or ():
            if size is not None and not (arguments.is_integer(size) and size > 0):
                raise ValueError(
                    "expected `noise_shape` to hold integers of at least 1, and None. "
                    f"Received: noise_shape={noise_shape!r}"
                )
        self.supports_masking = True

    def call(self, inputs, training=False):
        """Returns the inputs that are left, scaled, or all of them."""
        now = mode()
        if not self.rate:
            return inputs
        if isinstance(now, Samples):
            rows, *rest = ops.shape(inputs)
            _, *shape = self._shape(inputs)
            z = self._draw((now.count, *shape), now.seed(self))
            x = ops.reshape(inputs, (rows // now.count, now.count, *rest))
            return ops.reshape(x * z, (rows, *rest))
        if training and now is None:
            return inputs * self._draw(self._shape(inputs), self.seed_generator)
        return inputs

    def _shape(self, inputs):
        """The shape of z, with the batch's axis."""
        shape = tuple(ops.shape(inputs))
        noise = (None,) * len(shape) if self.noise_shape is None else self.noise_shape
        return tuple(s if n is None else n for s, n in zip(shape, noise, strict=True))

    def _draw(self, shape, seed):
        """z / (1 - p)."""
        left = 1 - self.rate
        return bernoulli(shape, seed, left, self.compute_dtype) / left

    def compute_output_shape(self, input_shape):
        """Returns the input's shape."""
        return input_shape

    def get_config(self):
        """Returns the constructor's arguments."""
        config = {"rate": self.rate, "noise_shape": self.noise_shape}
        return {**super().get_config(), **config}


def to_monte_carlo_dropout(model, seed=None):
    """Makes a copy of a model whose dropout can be drawn in prediction.

    Each `keras.layers.Dropout`, and each of the spatial ones, which drop whole
    channels, becomes a `kzoo.layers.MonteCarloDropout`. All else stays as it is, the
    weights too; until draws are asked for, the copy predicts as the model does.

    Reference: Gal, Ghahramani, "Dropout as a Bayesian Approximation: Representing Model
    Uncertainty in Deep Learning", 2016. https://arxiv.org/abs/1506.02142

    Args:
        model: A built Sequential or functional `keras.Model`. Dropout inside of other
            layers, such as that of recurrent layers and of attention, stays off in
            prediction; a warning names them.
        seed: Integer, from which each layer gets a seed of its own for training; or
            None.

    Returns:
        A `keras.Model`, not compiled.

    Raises:
        ValueError: If the model is not as described, or has no dropout.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import PosteriorSamples, to_monte_carlo_dropout
    >>> layers = [keras.layers.Dropout(0.5), keras.layers.Dense(3)]
    >>> model = keras.Sequential([keras.Input((5,)), *layers])
    >>> samples = PosteriorSamples(to_monte_carlo_dropout(model), 16)
    >>> samples.predict(np.ones((2, 5)), verbose=0).shape
    (2, 16, 3)
    """
    made = []

    def convert(layer):
        kind = type(layer)
        if kind is keras.layers.Dropout:
            noise_shape = layer.noise_shape
        elif kind in SPATIAL:
            noise_shape = [None] + [1] * SPATIAL[kind]
            last = getattr(layer, "data_format", "channels_last") == "channels_last"
            noise_shape.insert(len(noise_shape) if last else 1, None)
        else:
            return None
        own = None if seed is None else seed + len(made)
        made.append(
            MonteCarloDropout(
                layer.rate, noise_shape, own, name=layer.name, dtype=layer.dtype_policy
            )
        )
        return made[-1]

    found, copied = converted(
        model, convert, lambda *_: None, (keras.layers.Dropout, *SPATIAL)
    )
    left = [layer for layer in copied if _drops(layer)]
    if left:
        names = ", ".join(f"{type(w).__name__} {w.name!r}" for w in left)
        warnings.warn(
            f"to_monte_carlo_dropout: what these layers drop stays off in prediction: "
            f"{names}",
            stacklevel=2,
        )
    return found


def _drops(layer):
    """Whether a layer, or one inside of it, has dropout or noise of another kind."""
    return any(
        isinstance(one, (*OTHERS, keras.layers.Dropout))
        or any(
            isinstance(getattr(one, name, None), float) and getattr(one, name) > 0
            for name in ("dropout", "recurrent_dropout", "_dropout")
        )
        for one in layer._flatten_layers()
    )
