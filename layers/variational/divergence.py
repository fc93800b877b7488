"""How much the divergences of a model's posteriors count in its loss."""

import math

import keras

from ..ops.arguments import integer, is_number
from .base import check_num_examples, variational_layers


def scale_divergence(model, num_examples):
    """Divides the divergences of all variational layers of a model by N.

    With a loss that is a mean over examples, the negative evidence lower bound per
    example is that loss plus KL(q, p) / N, N the number of training examples. Instead
    of `num_examples` of each layer. Where a step is compiled it keeps the N that it
    has seen: the model's own steps are compiled anew, those of a model around it not.

    Args:
        model: A `keras.Model` or layer.
        num_examples: N, a number above 0; None for 1.

    Raises:
        ValueError: If N is not above 0, or the model has no variational layer.

    Example:

    >>> import keras
    >>> from kzoo.layers import DenseFlipout, scale_divergence
    >>> model = keras.Sequential([keras.Input((5,)), DenseFlipout(3)])
    >>> scale_divergence(model, num_examples=1000)
    """
    for layer in variational_layers(model):
        layer.num_examples = check_num_examples(num_examples)
    if isinstance(model, keras.Model):
        model.train_function = model.test_function = None


class DivergenceAnnealing(keras.callbacks.Callback):
    """Lets the divergences count for a part β of their weight, by epoch.

    In epoch t the loss has β_t KL(q, p) / N. Growing β from 0 to 1 lets the means
    settle before the prior pulls at them; β below 1 to the end gives a "cold"
    posterior.

    Args:
        schedule: Function of the epoch, counted from 0, that gives β. Or a number of
            epochs, over which β grows linearly to 1: β_t = min(1, (t + 1) / epochs).

    Raises:
        ValueError: If a number of epochs is no integer of at least 1; when an epoch
            begins, if the model has no variational layer, or β is below 0 or not
            finite.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import DenseFlipout, DivergenceAnnealing
    >>> layer = DenseFlipout(1, num_examples=8)
    >>> model = keras.Sequential([keras.Input((2,)), layer])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((8, 2)), np.ones((8, 1))
    >>> history = model.fit(
    ...     x, y, epochs=2, callbacks=[DivergenceAnnealing(4)], verbose=0
    ... )
    >>> print(float(layer.divergence_weight.numpy()))  # half-way, after 2 of 4
    0.5
    """

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        if not callable(schedule):
            self.schedule = integer("schedule", schedule)

    def on_epoch_begin(self, epoch, logs=None):
        """Sets β for the epoch."""
        if callable(self.schedule):
            beta = self.schedule(epoch)
        else:
            beta = min(1.0, (epoch + 1) / self.schedule)
        if not is_number(beta) or not 0 <= beta < math.inf:
            raise ValueError(
                "expected `schedule` to give finite numbers of at least 0. Received: "
                f"{beta!r} for epoch {epoch}"
            )
        for layer in variational_layers(self.model):
            layer.set_divergence_weight(beta)
