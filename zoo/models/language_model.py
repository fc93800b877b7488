"""Recurrent language models, with any recurrent layer."""

from functools import partial

import keras
from keras import ops

from ...layers import RevGRU, WeightDrop
from ...layers.ops.arguments import integer
from ...layers.ops.arguments import rate as checked_rate
from ...layers.ops.random import bernoulli
from ...layers.seeded import SeededLayer
from ..registry import register_model


def language_model(
    vocabulary,
    *,
    embedding=650,
    units=1150,
    layers=2,
    recurrent=keras.layers.LSTM,
    project=False,
    rows=None,
    embedding_dropout=0.1,
    input_dropout=0.4,
    hidden_dropout=0.3,
    output_dropout=0.4,
    weight_drop=0.5,
    name="language_model",
):
    """Builds a recurrent language model, from ids to logits of those that follow.

    Ids are looked up in a table E, go through recurrent layers, and what the last one
    gives, h_t, is compared with the vectors of all ids:

        x_t = E[id_t],   logits_t = h_t Eᵀ.

    So the last layer has the vectors' size d, as in the paper; or, with `project`, all
    layers have `units` and logits_t = (P h_t) Eᵀ.

    In training it drops, for all steps of a batch the same ones,

    - ids: the vectors of some, in the lookup (`embedding_dropout`);
    - units of x, of what layers give to the next one and of what the last gives
      (`input_dropout`, `hidden_dropout`, `output_dropout`), others in each row;
    - recurrent weights (`weight_drop`, see `kzoo.layers.WeightDrop`).

    With `rows` = B the states that a batch of B rows ends with are those that the next
    one begins with, in training, evaluation and prediction: for truncated
    backpropagation through time over the batches of `kzoo.zoo.datasets.text_streams`.
    `ResetStates` sets them back as each of these begins. (Keras's `stateful` layers,
    whose states are none of their variables, begin with zeros in each batch of a `fit`
    on JAX.) A model with other `rows`, or none, as exports have it, takes the weights
    of a trained one by `take_weights`.

    Reference: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language
    Models", 2017. https://arxiv.org/abs/1708.02182. With reversible layers: MacKay,
    Vicol, Ba, Grosse, "Reversible Recurrent Neural Networks", 2018.
    https://arxiv.org/abs/1810.10999; the defaults are its own.

    Args:
        vocabulary: Number of ids.
        embedding: d, the size of the vectors.
        units: Size of the layers, but of the last one's without `project`.
        layers: Number of recurrent layers.
        recurrent: Makes a layer, of a size and of `return_sequences`, `return_state`
            and `name`: `keras.layers.GRU`, `keras.layers.LSTM`, `kzoo.layers.RevGRU`,
            `kzoo.layers.RevLSTM` or a `functools.partial` of one.
        project: Whether there is P, `[units, d]`.
        rows: B, the number of streams whose states are carried; None: each batch, of
            any size, begins with zeros.
        embedding_dropout: Rate of dropped ids.
        input_dropout: Rate of dropped units of x.
        hidden_dropout: Rate of dropped units between layers.
        output_dropout: Rate of dropped units of the last layer.
        weight_drop: Rate of dropped recurrent weights.
        name: Name of the model.

    Returns:
        A `keras.Model` from `ids`, integers `[B, T]`, to logits `[B, T, vocabulary]`.

    Raises:
        ValueError: If a number is no integer of at least 1, or a rate not at least 0
            and below 1.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import RevGRU
    >>> from kzoo.zoo.models.language_model import language_model
    >>> model = language_model(50, embedding=8, units=16, recurrent=RevGRU)
    >>> tuple(model(np.array([[3, 1, 4], [1, 5, 9]])).shape)
    (2, 3, 50)
    """
    vocabulary, size = (
        integer("vocabulary", vocabulary),
        integer("embedding", embedding),
    )
    units, layers = integer("units", units), integer("layers", layers)
    rows = None if rows is None else integer("rows", rows)
    weight_drop = checked_rate("weight_drop", weight_drop)

    def locked(p, name):
        return _LockedDropout(p, name=f"{name}_dropout")

    ids = keras.Input(batch_shape=(rows, None), dtype="int32", name="ids")
    table = keras.layers.ReversibleEmbedding(
        vocabulary,
        size,
        embeddings_initializer=keras.initializers.RandomUniform(-0.1, 0.1),
        # Logits as exact as the weights, also under mixed precision.
        dtype=keras.config.dtype_policy().variable_dtype,
        name="embedding",
    )
    x = _IdDropout(vocabulary, embedding_dropout, name="id_dropout")([table(ids), ids])
    x = locked(input_dropout, "input")(x)
    for i in range(layers):
        last = i == layers - 1
        layer = recurrent(
            size if last and not project else units,
            return_sequences=True,
            return_state=rows is not None,
            name=f"recurrent{i}",
        )
        if rows is not None:
            layer = _CarriedState(layer, name=f"carried{i}")
        if weight_drop:
            layer = WeightDrop(layer, weight_drop, name=f"dropped{i}")
        x = layer(x)
        if not last:
            x = locked(hidden_dropout, f"hidden{i}")(x)
    x = locked(output_dropout, "output")(x)
    if project:
        x = keras.layers.Dense(size, use_bias=False, name="projection")(x)
    return keras.Model(ids, table(x, reverse=True), name=name)


def take_weights(model, trained):
    """Gives a language model the weights of one that differs in `rows` alone.

    Args:
        model: A `language_model`.
        trained: Another one.
    """
    for v, w in zip(
        model.trainable_variables, trained.trainable_variables, strict=True
    ):
        v.assign(ops.convert_to_numpy(w))  # A copy: steps on JAX free what they take.


class ResetStates(keras.callbacks.Callback):
    """Sets the carried states of a language model to 0 before a text begins.

    That is, as epochs, evaluations and predictions begin.

    Example:

    >>> import numpy as np
    >>> from kzoo.zoo.models.language_model import ResetStates, language_model
    >>> model = language_model(9, embedding=4, units=4, layers=1, rows=2)
    >>> model.compile("sgd", "sparse_categorical_crossentropy")
    >>> x = np.ones((2, 3))
    >>> history = model.fit(x, x, batch_size=2, callbacks=[ResetStates()], verbose=0)
    """

    def on_epoch_begin(self, epoch, logs=None):
        """Begins the streams anew."""
        for layer in self.model._flatten_layers():
            if isinstance(layer, _CarriedState):
                layer.reset_state()

    def on_test_begin(self, logs=None):
        """Begins the streams anew; within `fit`, an epoch has ended before."""
        self.on_epoch_begin(None)

    def on_predict_begin(self, logs=None):
        """Begins the streams anew."""
        self.on_epoch_begin(None)


@keras.saving.register_keras_serializable(package="kzoo", name="CarriedState")
class _CarriedState(keras.layers.Wrapper):
    """A recurrent layer that begins a batch with the states that the last one left.

    The states are variables of this layer, and so part of what a step returns on JAX,
    and of what is saved.
    """

    def build(self, input_shape):
        super().build(input_shape)
        self.states = [
            self.add_weight(
                name="state",
                shape=(input_shape[0], size),
                initializer="zeros",
                trainable=False,
                autocast=False,
            )
            for size in keras.tree.flatten(self.layer.cell.state_size)
        ]

    def call(self, inputs, training=False):
        first = [ops.convert_to_tensor(state) for state in self.states]
        y, *last = self.layer(inputs, initial_state=first, training=training)
        for state, new in zip(self.states, last, strict=True):
            state.assign(ops.cast(new, state.dtype))
        return y

    def reset_state(self):
        for state in self.states:
            state.assign(ops.zeros(state.shape, state.dtype))

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)[0]

    def get_config(self):
        config = super().get_config()
        # The layer is built with this one, whose name its weights' paths begin with.
        config["layer"].pop("build_config", None)
        return config


@keras.saving.register_keras_serializable(package="kzoo", name="LockedDropout")
class _LockedDropout(SeededLayer):
    """Drops units of `[B, T, d]` at rate p, the same ones at all steps of a row."""

    def __init__(self, rate, **kwargs):
        super().__init__(**kwargs)
        self.rate = checked_rate("rate", rate)

    def call(self, inputs, training=False):
        if not (training and self.rate):
            return inputs
        rows, _, size = ops.shape(inputs)
        left = 1 - self.rate
        mask = bernoulli((rows, 1, size), self.seed_generator, left, inputs.dtype)
        return inputs * mask / left

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}


@keras.saving.register_keras_serializable(package="kzoo", name="IdDropout")
class _IdDropout(SeededLayer):
    """Drops the vectors `[B, T, d]` of some ids `[B, T]`, in the whole batch."""

    def __init__(self, vocabulary, rate, **kwargs):
        super().__init__(**kwargs)
        self.vocabulary, self.rate = vocabulary, checked_rate("rate", rate)

    def call(self, inputs, training=False):
        vectors, ids = inputs
        if not (training and self.rate):
            return vectors
        left = 1 - self.rate
        mask = bernoulli((self.vocabulary,), self.seed_generator, left, vectors.dtype)
        return vectors * ops.take(mask, ids, axis=0)[..., None] / left

    def compute_output_shape(self, input_shape):
        return input_shape[0]

    def get_config(self):
        config = {"vocabulary": self.vocabulary, "rate": self.rate}
        return {**super().get_config(), **config}


@register_model(
    "rev_gru_python_source",
    description="Reversible GRU of a million parameters on the characters of Python's "
    "standard library.",
    dataset="python_source",
    input_shape=(None,),
    paper="https://arxiv.org/abs/1810.10999",
    task="language modelling",
)
def rev_gru_python_source(name="rev_gru_python_source", **overrides):
    """Builds a language model of characters with one layer of RevGRU, at 3 bits.

    It has the 100 ids that `kzoo.zoo.datasets.text_streams` gives the characters of the
    library, of Python 3.11 to 3.13.

    Args:
        name: Name of the model.
        **overrides: Arguments of `language_model`.
    """
    arguments = {
        "vocabulary": 100,
        "embedding": 128,
        "units": 692,
        "layers": 1,
        "recurrent": partial(RevGRU, max_forget_bits=3),
        "project": True,
        "embedding_dropout": 0.0,
        "input_dropout": 0.1,
        "output_dropout": 0.1,
        "weight_drop": 0.1,
    }
    return language_model(**{**arguments, **overrides}, name=name)
