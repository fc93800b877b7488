"""The Transformer: an encoder and a decoder of attention."""

import keras
import numpy as np
from keras import ops

from ...layers import AverageMembers, TileMembers
from ...layers.ops.arguments import integer, rate
from ...layers.ops.batch_ensemble import split_members
from .batch_ensemble import check_members


def transformer(
    vocabulary,
    *,
    layers=6,
    width=512,
    heads=8,
    hidden=2048,
    dropout=0.1,
    pre_norm=False,
    embedding=keras.layers.Embedding,
    attention=keras.layers.MultiHeadAttention,
    dense=keras.layers.Dense,
    normalization=keras.layers.LayerNormalization,
    ensemble_size=1,
    name="transformer",
):
    """Builds the Transformer of Vaswani et al., from a source and a target to logits.

    Ids of source and target are looked up in one table E of vectors of size d,
    multiplied by sqrt(d), and told their positions t by sines and cosines:

        x_t = sqrt(d) E[id_t] + PE_t,
        PE_t,2i = sin(t / 10000^(2i/d)),   PE_t,2i+1 = cos(t / 10000^(2i/d)).

    Each layer of the encoder attends to the source and then passes through a network
    f(x) = relu(x W_1 + b_1) W_2 + b_2 at each position; each of the decoder attends to
    the target up to its position, to the encoder's output, and has its own f. Around
    each of these, x becomes LN(x + f(x)) with layer normalization LN; or with
    `pre_norm` x + f(LN(x)), and LN of what the last layer gives. The decoder's output
    h_t is compared with all vectors:

        logits_t = h_t Eᵀ.

    Where an id is 0 there is padding: nothing attends to it, and losses pass over it.

    The method that the weights follow comes in with the layer factories `embedding`,
    `attention`, `dense` and `normalization`; with `ensemble_size` members, whose
    batches are member-major, the model tiles its inputs and averages its output itself.
    Layers that draw their weights draw E for each of its three uses.

    As in the paper dropout is on the sums of vectors and positions and on each f(x); a
    factory can give attention its own. Attention has biases, as Keras has it.

    Reference: Vaswani et al., "Attention Is All You Need", 2017.
    https://arxiv.org/abs/1706.03762

    Args:
        vocabulary: Number of ids, with 0 for padding.
        layers: Number of layers of the encoder, and of the decoder.
        width: d, the size of the vectors, an even multiple of `heads`.
        heads: Number of attention's heads.
        hidden: Size of f's hidden layer.
        dropout: Rate of what is dropped in training.
        pre_norm: Whether f's inputs are normalized, and not the sums.
        embedding: Makes the table: takes `keras.layers.Embedding`'s arguments.
        attention: Makes attention: takes `keras.layers.MultiHeadAttention`'s arguments.
        dense: Makes f's layers: takes `keras.layers.Dense`'s arguments.
        normalization: Makes the normalizations: takes
            `keras.layers.LayerNormalization`'s arguments.
        ensemble_size: M, the members that the layers made by the factories have.
        name: Name of the model.

    Returns:
        A `keras.Model` from a dict of ids, `source` `[B, S]` and `target` `[B, T]`, to
        logits `[B, T, vocabulary]` of the id that follows each of the target's. (A
        target starts with an id that stands for its beginning.) Of an ensemble, the
        logits of the mean of the members' probabilities; in training, the members'
        log-probabilities, for a member-major batch.

    Raises:
        ValueError: If a number is no integer of at least 1, `width` is not even or not
            a multiple of `heads`, `dropout` is not at least 0 and below 1, or the
            factories' layers have other members.

    Example:

    >>> import numpy as np
    >>> from kzoo.zoo.models.transformer import transformer
    >>> model = transformer(100, layers=1, width=16, heads=2, hidden=32)
    >>> source, target = np.array([[5, 7, 2, 0]]), np.array([[1, 9, 9]])
    >>> tuple(model({"source": source, "target": target}).shape)
    (1, 3, 100)
    """
    vocabulary, width = integer("vocabulary", vocabulary), integer("width", width)
    numbers, heads = integer("layers", layers), integer("heads", heads)
    hidden, dropout = integer("hidden", hidden), rate("dropout", dropout)
    ensemble_size = integer("ensemble_size", ensemble_size)
    if width % 2 or width % heads:
        raise ValueError(
            f"expected `width` to be even and a multiple of {heads} heads. "
            f"Received: width={width}"
        )

    def norm(x, name):
        return normalization(epsilon=1e-6, name=f"{name}_norm")(x)

    def drop(x, name):
        return keras.layers.Dropout(dropout, name=f"{name}_dropout")(x)

    def around(f, x, name):
        y = drop(f(norm(x, name) if pre_norm else x), name)
        x = keras.layers.Add(name=f"{name}_add")([x, y])
        return x if pre_norm else norm(x, name)

    def attend(x, name, mask, to=None, causal=False):
        layer = attention(heads, width // heads, name=name)

        def f(x):
            value = x if to is None else to
            return layer(x, value, attention_mask=mask, use_causal_mask=causal)

        return around(f, x, name)

    def feed_forward(x, name):
        first = dense(hidden, activation="relu", name=f"{name}_1")
        second = dense(width, name=f"{name}_2")
        return around(lambda x: second(first(x)), x, name)

    inputs = {
        part: keras.Input((None,), dtype="int32", name=part)
        for part in ("source", "target")
    }
    table = embedding(vocabulary, width, name="embedding")
    ids, vectors, masks = {}, {}, {}
    for part, x in inputs.items():
        if ensemble_size > 1:
            x = TileMembers(ensemble_size, name=f"{part}_tile_members")(x)
        ids[part] = x
        vectors[part] = drop(_Positions(name=f"{part}_positions")(table(x)), part)
        masks[part] = _IsNoPadding(name=f"{part}_mask")(x)

    x, seen = vectors["source"], masks["source"]
    for i in range(numbers):
        x = attend(x, f"encoder{i}_attention", seen)
        x = feed_forward(x, f"encoder{i}_dense")
    encoded = norm(x, "encoder") if pre_norm else x
    x = vectors["target"]
    for i in range(numbers):
        x = attend(x, f"decoder{i}_attention", masks["target"], causal=True)
        x = attend(x, f"decoder{i}_source", seen, to=encoded)
        x = feed_forward(x, f"decoder{i}_dense")
    x = norm(x, "decoder") if pre_norm else x

    all_ids = _AllIds(vocabulary, ensemble_size, name="all_ids")(ids["target"])
    # Sums as exact as the weights, also under mixed precision.
    dtype = keras.config.dtype_policy().variable_dtype
    logits = _Logits(dtype=dtype, name="logits")
    x = logits([x, table(all_ids), ids["target"]])
    if ensemble_size > 1:
        x = AverageMembers(ensemble_size, name="average_members")(x)
    model = keras.Model(inputs, x, name=name)
    check_members(model, ensemble_size)
    return model


@keras.saving.register_keras_serializable(package="kzoo", name="TransformerPositions")
class _Positions(keras.layers.Layer):
    """sqrt(d) x_t + PE_t for vectors x_t of size d, an even number."""

    def call(self, inputs):
        size = inputs.shape[-1]
        frequencies = 10000.0 ** (-np.arange(0, size, 2) / size)
        t = ops.arange(ops.shape(inputs)[1], dtype="float32")
        angles = t[:, None] * ops.convert_to_tensor(frequencies, "float32")
        positions = ops.stack([ops.sin(angles), ops.cos(angles)], axis=-1)
        positions = ops.reshape(positions, (-1, size))
        return inputs * size**0.5 + ops.cast(positions, inputs.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable(package="kzoo", name="TransformerIsNoPadding")
class _IsNoPadding(keras.layers.Layer):
    """Where ids `[B, T]` are no padding, for attention to them: `[B, 1, T]`.

    Not Keras's masks, which attention takes off the tensors it attends to, so that
    what is added to its output has none any more.
    """

    def call(self, inputs):
        return ops.not_equal(inputs, 0)[:, None, :]

    def compute_output_spec(self, inputs):
        rows, positions = inputs.shape
        return keras.KerasTensor((rows, 1, positions), dtype="bool")


@keras.saving.register_keras_serializable(package="kzoo", name="TransformerAllIds")
class _AllIds(keras.layers.Layer):
    """All ids `[M, vocabulary]`, a row for each member, whatever comes in."""

    def __init__(self, vocabulary, ensemble_size, **kwargs):
        super().__init__(**kwargs)
        self.vocabulary, self.ensemble_size = vocabulary, ensemble_size

    def member(self, index):
        return _AllIds(self.vocabulary, 1, name=self.name)

    def call(self, inputs):
        ids = ops.arange(self.vocabulary, dtype="int32")
        return ops.broadcast_to(ids, (self.ensemble_size, self.vocabulary))

    def compute_output_spec(self, inputs):
        shape = (self.ensemble_size, self.vocabulary)
        return keras.KerasTensor(shape, dtype="int32")

    def get_config(self):
        return {
            **super().get_config(),
            "vocabulary": self.vocabulary,
            "ensemble_size": self.ensemble_size,
        }


@keras.saving.register_keras_serializable(package="kzoo", name="TransformerLogits")
class _Logits(keras.layers.Layer):
    """h Eᵀ of h `[M * B, T, d]` and the members' tables E, `[M, vocabulary, d]`.

    The third input is the ids, of which losses shall pass over the zeros.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs):
        x, table, _ = inputs
        members = split_members(x, table.shape[0])
        logits = ops.einsum("mbtd,mvd->mbtv", members, table)
        return ops.reshape(logits, (-1, *ops.shape(logits)[2:]))

    def compute_mask(self, inputs, previous_mask):
        return ops.not_equal(inputs[2], 0)

    def compute_output_shape(self, input_shape):
        (*rows, _), (_, vocabulary, _), _ = input_shape
        return (*rows, vocabulary)
