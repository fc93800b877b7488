"""DropConnect on recurrent weights: weight drop."""

import keras

from .ops.arguments import rate as checked_rate
from .ops.random import bernoulli
from .recurrent import RecurrentLayer
from .seeded import SeededLayer
from .variational.base import BayesianLayer


@keras.saving.register_keras_serializable(package="kzoo")
class WeightDrop(SeededLayer, keras.layers.Wrapper):
    """Drops recurrent weights of a layer in training, the same ones at all steps.

    With p the rate and M a mask of independent entries, 1 with probability 1 - p, each
    recurrent kernel U of the layer counts in training as

        M ∘ U / (1 - p),

    with a mask for each call, that is, for a batch of sequences. In inference it is U.

    The layer may be any that has variables named `recurrent_kernel`: Keras's GRU, LSTM
    and SimpleRNN, `kzoo.layers.RevGRU` and `RevLSTM`, a `keras.layers.Bidirectional`
    or a `keras.layers.RNN` around cells. Weights are dropped before the first step, so
    reversible layers, whose way back reads the very weights of the way there, stay
    exact and keep nothing for it but M ∘ U.

    The paper's text has no 1 - p; its code divides by it, as dropout does, so that the
    mean over masks is U.

    References: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language
    Models", 2017. https://arxiv.org/abs/1708.02182; Wan, Zeiler, Zhang, LeCun, Fergus,
    "Regularization of Neural Networks using DropConnect", 2013.
    https://proceedings.mlr.press/v28/wan13.html

    Args:
        layer: The layer. What goes with the masked weights would be lost: losses of the
            layer's own or of layers inside of it, as `activity_regularizer` adds them,
            which can be given here, and divergences of posteriors; and the states of
            Keras's layers that are `stateful` (those of this package's are kept).
        rate: p, at least 0 and below 1.
        seed: Integer, for the same masks again, or None.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        sequences: As the layer takes them.
        initial_state: As the layer takes it.
        mask: As the layer takes it.
        training: Whether to drop weights.

    Input shape:
        The layer's.

    Output shape:
        The layer's.

    Raises:
        ValueError: If `rate` is out of range, the layer or one inside of it has an
            activity regularizer or posteriors, or is Keras's and stateful, or, when it
            is built, has no recurrent kernel.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import RevGRU, WeightDrop
    >>> layer = WeightDrop(RevGRU(4, max_forget_bits=3), 0.5, seed=0)
    >>> x = np.ones((2, 10, 3), "float32")
    >>> dropped, whole = layer(x, training=True), layer(x)
    >>> bool(keras.ops.all(dropped == whole)), tuple(whole.shape)
    (False, (2, 4))
    """

    def __init__(self, layer, rate=0.5, *, seed=None, **kwargs):
        super().__init__(layer=layer, seed=seed, **kwargs)
        self.rate = checked_rate("rate", rate)
        for one in layer._flatten_layers():
            _check_nothing_is_lost(one)
        self.supports_masking = layer.supports_masking

    def build(self, sequences_shape, initial_state_shape=None):
        """Builds the layer."""
        super().build(sequences_shape)
        if not self._kernels():
            names = sorted({v.name for v in self.layer.variables})
            raise ValueError(
                "expected a layer with a variable named 'recurrent_kernel'. Received: "
                f"layer={self.layer.name!r} with {names}"
            )

    def _kernels(self):
        return [v for v in self.layer.variables if v.name == "recurrent_kernel"]

    def call(self, sequences, initial_state=None, mask=None, training=False):
        """Returns what the layer does with the weights that are left, or with all."""
        given = {"mask": mask} if mask is not None else {}
        if initial_state is not None:
            given["initial_state"] = initial_state
        if training and self.rate:
            outputs = self._call_dropped(sequences, given)
        else:
            outputs = self.layer(sequences, **given, training=training)
        return keras.tree.map_structure(
            lambda y: keras.ops.cast(y, self.compute_dtype), outputs
        )

    def _call_dropped(self, sequences, given):
        left = 1 - self.rate
        kernels = {id(v) for v in self._kernels()}

        def value(v):
            if id(v) not in kernels:
                return v.value
            kept = bernoulli(v.shape, self.seed_generator, left, v.dtype)
            return keras.ops.cast(v.value, v.dtype) * kept / left

        variables = self.layer.non_trainable_variables
        outputs, values = self.layer.stateless_call(
            [value(v) for v in self.layer.trainable_variables],
            [value(v) for v in variables],
            sequences,
            **given,
            training=True,
        )
        for v, new in zip(variables, values, strict=True):
            if id(v) not in kernels:  # The states of seeds, say.
                v.assign(new)
        return outputs

    def compute_mask(self, inputs, mask=None):
        """Returns the layer's mask."""
        return self.layer.compute_mask(inputs, mask)

    def compute_output_shape(self, sequences_shape, initial_state_shape=None):
        """Returns the layer's shape."""
        return self.layer.compute_output_shape(sequences_shape)

    def get_config(self):
        """Returns the constructor's arguments."""
        config = {**super().get_config(), "rate": self.rate}
        # The layer is built with this one, whose name its weights' paths begin with.
        config["layer"].pop("build_config", None)
        return config

    @classmethod
    def from_config(cls, config):
        """Makes a layer from what `get_config` returns."""
        return super().from_config(dict(config))


def _check_nothing_is_lost(layer):
    """Refuses what `stateless_call` does not give back: losses, untracked states."""
    if layer.activity_regularizer is not None:
        raise ValueError(
            "expected `activity_regularizer` to be given to this layer, and not to one "
            f"that it wraps. Received: {layer.name!r} with activity_regularizer="
            f"{layer.activity_regularizer!r}"
        )
    if isinstance(layer, BayesianLayer):
        raise ValueError(
            "expected weights that are no distributions, whose divergences would be "
            f"lost. Received: {type(layer).__name__} {layer.name!r}"
        )
    is_ours = isinstance(layer, RecurrentLayer)
    if isinstance(layer, keras.layers.RNN) and layer.stateful and not is_ours:
        raise ValueError(
            "expected no layer of Keras's that is stateful: it does not count its "
            f"states among its variables. Received: {layer.name!r} with stateful=True"
        )
