"""The recurrent encoder and decoder with attention, and its search for translations."""

import re
from functools import partial

import keras
from keras import ops

from ...layers import RevGRU
from ...layers.ops.arguments import integer, nonnegative, rate
from ...layers.ops.beam_search import beam_search
from ...layers.reversible.base import ReversibleLayer
from ..registry import register_model

ATTEND_TO = ("states", "embeddings", "slice", "slice and embeddings")


def attention_seq2seq(
    vocabulary,
    *,
    units=300,
    layers=1,
    recurrent=keras.layers.GRU,
    attend_to="states",
    slice_size=20,
    dropout=0.0,
    name="attention_seq2seq",
):
    """Builds an encoder-decoder with global attention, from two sequences to logits.

    Vectors x_s of the source's ids go through the encoder's recurrent layers, whose
    last states are the decoder's first. With h_t the decoder's top state after the
    target's ids up to t, and m_s what it attends to of the source,

        a_t = softmax over s of h_tᵀ W_a m_s,   c_t = Σ_s a_ts m_s,
        h̃_t = tanh(W_c [c_t; h_t]),   logits_t = W h̃_t + b.

    Nothing of attention goes into the next step, so the decoder's layers run over a
    whole target, and a reversible one keeps no states. What m_s is decides how much is
    kept of the encoder for the gradient:

    - "states": the states of its top layer, all of them;
    - "embeddings": the vectors x_s. No state is kept, and of m_s nothing tells where
      in the source it is;
    - "slice": the first `slice_size` units of these states. Reversible layers keep
      those alone;
    - "slice and embeddings": both, side by side.

    Where an id is 0 there is padding: states stay as they are, nothing attends to it,
    and losses pass over it. Dropped in training are units of the vectors, of what goes
    from layer to layer, of slices and of the decoder's states, each the same at all
    steps.

    Reference: MacKay, Vicol, Ba, Grosse, "Reversible Recurrent Neural Networks", 2018.
    https://arxiv.org/abs/1810.10999
    Luong, Pham, Manning, "Effective Approaches to Attention-based Neural Machine
    Translation", 2015. https://arxiv.org/abs/1508.04025

    Args:
        vocabulary: Number of ids, with 0 for padding.
        units: Size of vectors and states.
        layers: Number of recurrent layers of the encoder, and of the decoder. What
            goes from one to the next is kept at all steps.
        recurrent: Makes them: takes `keras.layers.GRU`'s arguments, such as
            `keras.layers.LSTM` or `functools.partial(kzoo.layers.RevGRU,
            max_forget_bits=3)`, and gives the layer a `cell`.
        attend_to: What m_s is, one of the four above.
        slice_size: Size of slices, at most `units`.
        dropout: Rate of what is dropped in training.
        name: Name of the model.

    Returns:
        A `keras.Model` from a dict of ids, `source` `[B, S]` and `target` `[B, T]`, to
        logits `[B, T, vocabulary]` of the id that follows each of the target's. (A
        target starts with an id that stands for its beginning.) `translator` makes of
        it what searches for targets.

    Raises:
        ValueError: If a number is no integer of at least 1, `slice_size` exceeds
            `units`, `dropout` is not at least 0 and below 1, or `attend_to` none of
            the four.

    Example:

    >>> from functools import partial
    >>> import numpy as np
    >>> from kzoo.layers import RevGRU
    >>> from kzoo.zoo.models.attention_seq2seq import attention_seq2seq
    >>> model = attention_seq2seq(
    ...     100, units=8, recurrent=partial(RevGRU, max_forget_bits=3),
    ...     attend_to="slice", slice_size=2,
    ... )
    >>> source, target = np.array([[5, 7, 2, 0]]), np.array([[1, 9, 9]])
    >>> tuple(model({"source": source, "target": target}).shape)
    (1, 3, 100)
    """
    vocabulary, units = integer("vocabulary", vocabulary), integer("units", units)
    numbers, dropout = integer("layers", layers), rate("dropout", dropout)
    if attend_to not in ATTEND_TO:
        raise ValueError(
            f"expected `attend_to` to be one of {ATTEND_TO}. "
            f"Received: attend_to={attend_to!r}"
        )
    has_slice, has_embeddings = "slice" in attend_to, "embeddings" in attend_to
    if has_slice:
        slice_size = integer("slice_size", slice_size, 1, units)

    def embed(x, name):
        x = keras.layers.Embedding(
            vocabulary, units, mask_zero=True, name=f"{name}_embedding"
        )(x)
        return drop(x, name)

    def drop(x, name):
        return keras.layers.SpatialDropout1D(dropout, name=f"{name}_dropout")(x)

    inputs = {
        part: keras.Input((None,), dtype="int32", name=part)
        for part in ("source", "target")
    }
    x = embeddings = embed(inputs["source"], "source")
    states, top = [], numbers - 1
    for i in range(numbers):
        layer = recurrent(
            units,
            return_sequences=i < top or attend_to != "embeddings",
            return_state=True,
            name=f"encoder{i}",
        )
        if i == top and has_slice and isinstance(layer, ReversibleLayer):
            layer.output_units = slice_size
        x, *of_layer = layer(x)
        states.append(of_layer)
        if i < top:
            x = drop(x, f"encoder{i}")
    memory = [embeddings] if has_embeddings else []
    if has_slice:
        x = drop(_FirstUnits(slice_size, name="slice")(x), "slice")
    if attend_to != "embeddings":
        memory.append(x)
    if len(memory) > 1:
        memory = [keras.layers.Concatenate(name="slice_and_embeddings")(memory)]

    x = embed(inputs["target"], "target")
    for i in range(numbers):
        layer = recurrent(units, return_sequences=True, name=f"decoder{i}")
        x = drop(layer(x, initial_state=states[i]), f"decoder{i}")
    query = keras.layers.Dense(memory[0].shape[-1], use_bias=False, name="query")(x)
    context = keras.layers.Attention(name="attention")([query, *memory])
    x = keras.layers.Concatenate(name="context_and_state")([context, x])
    x = keras.layers.Dense(units, "tanh", use_bias=False, name="attended")(x)
    # Sums as exact as the weights, also under mixed precision.
    dtype = keras.config.dtype_policy().variable_dtype
    x = keras.layers.Dense(vocabulary, dtype=dtype, name="logits")(x)
    return keras.Model(inputs, x, name=name)


def translator(
    model, *, beams=4, length=100, start=1, end=2, length_penalty=0.0, name=None
):
    """Makes a model that finds targets for sources, with the weights of another.

    The search is `kzoo.layers.ops.beam_search.beam_search`, from the first state that
    the encoder gives, one step of the decoder at a time.

    Args:
        model: What `attention_seq2seq` has built.
        beams: Number of beams; with one the search is greedy.
        length: How many ids a target has at most, its end counted.
        start: The id that stands for a target's beginning, one of the vocabulary's.
        end: The id of its end.
        length_penalty: α, at least 0: how much longer targets are preferred.
        name: Name of the new model. Defaults to the other's.

    Returns:
        A `keras.Model` from ids `source` `[B, S]` to a dict of the best target that is
        found for each: `ids` `[B, length]`, without the start and 0 after the end, and
        `scores` `[B]`, their log-probabilities over the length penalty.
        `kzoo.zoo.export` makes it itself of an encoder-decoder.

    Raises:
        ValueError: If a number is not within its bounds, or a layer of the decoder has
            no `cell` to make a step with.

    Example:

    >>> import numpy as np
    >>> from kzoo.zoo.models.attention_seq2seq import attention_seq2seq, translator
    >>> model = attention_seq2seq(100, units=8)
    >>> found = translator(model, beams=2, length=6)(np.array([[5, 7, 2, 0]]))
    >>> tuple(found["ids"].shape), tuple(found["scores"].shape)
    ((1, 6), (1,))
    """
    source = keras.Input((None,), dtype="int32", name="source")
    last = model.get_layer("logits").units - 1
    search = _Translate(
        model,
        beams=integer("beams", beams),
        length=integer("length", length),
        start=integer("start", start, 1, last),
        end=integer("end", end, 1, last),
        length_penalty=nonnegative("length_penalty", length_penalty),
        name="translate",
    )
    return keras.Model(source, search(source), name=name or model.name)


def is_attention_seq2seq(model):
    """Returns whether a model is one that `translator` takes.

    Args:
        model: A `keras.Model`.
    """
    names = {layer.name for layer in getattr(model, "layers", ())}
    parts = {"target_embedding", "encoder0", "decoder0", "attention", "logits"}
    return parts <= names


@register_model(
    "attention_seq2seq_camel_case",
    description="Encoder-decoder of RevGRU, with attention to a slice of the encoder's "
    "states: writes names in camel case.",
    dataset="camel_case",
    task="translation",
    input_shape=(24,),
    paper="https://arxiv.org/abs/1810.10999",
    recipe={"epochs": 8, "batch_size": 64, "learning_rate": 4e-3},
)
def attention_seq2seq_camel_case(
    max_forget_bits=3, name="attention_seq2seq_camel_case", **overrides
):
    """Builds a reversible encoder-decoder for the names of the data set camel_case.

    Args:
        max_forget_bits: The limit on what `kzoo.layers.RevGRU` forgets.
        name: Name of the model.
        **overrides: Arguments of `attention_seq2seq`.
    """
    own = {
        "units": 128,
        "recurrent": partial(RevGRU, max_forget_bits=max_forget_bits),
        "attend_to": "slice",
        "slice_size": 20,
    }
    return attention_seq2seq(56, **{**own, **overrides}, name=name)


@keras.saving.register_keras_serializable(package="kzoo", name="Seq2SeqFirstUnits")
class _FirstUnits(keras.layers.Layer):
    """The first units of states `[B, T, units]`."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size
        self.supports_masking = True

    def call(self, inputs):
        return inputs[..., : self.size]

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.size)

    def get_config(self):
        return {**super().get_config(), "size": self.size}


@keras.saving.register_keras_serializable(package="kzoo", name="Seq2SeqTranslate")
class _Translate(keras.layers.Layer):
    """Searches for targets by the steps of a model's decoder."""

    def __init__(self, model, **kwargs):
        search = ("beams", "length", "start", "end", "length_penalty")
        self.search = {name: kwargs.pop(name) for name in search}
        # The model's own layers say what is in half precision; what is between them is
        # in the precision of the logits, whatever the policy is by now.
        super().__init__(**{**kwargs, "dtype": model.get_layer("logits").dtype_policy})
        self.model = model
        names = [x.name for x in model.layers if re.fullmatch(r"decoder\d+", x.name)]
        self.decoders = [model.get_layer(f"decoder{i}") for i in range(len(names))]
        for decoder in self.decoders:
            if not hasattr(decoder, "cell"):
                raise ValueError(
                    "expected layers of the decoder that have a `cell`, to make a step "
                    f"with. Received: {type(decoder).__name__} {decoder.name!r}"
                )
        _, memory = model.get_layer("attention").input
        states = [model.get_layer(f"encoder{i}").output[1:] for i in range(len(names))]
        self.encoder = keras.Model(model.input["source"], [memory, states])

    def call(self, inputs):
        memory, states = self.encoder(inputs, training=False)
        beams, layer = self.search["beams"], self.model.get_layer
        seen = ops.not_equal(inputs, 0)
        first = keras.tree.map_structure(lambda s: ops.repeat(s, beams, axis=0), states)

        def step(ids, states):
            # Not by `__call__`, which would tell the cells of padding.
            x = layer("target_embedding").call(ops.reshape(ids, (-1,)))
            new = []
            for decoder, of_layer in zip(self.decoders, states, strict=True):
                x, of_layer = decoder.cell(x, of_layer, training=False)
                new.append(list(of_layer))
            # Beams take the place of steps: all attend to the same.
            h = ops.reshape(x, (-1, beams, x.shape[-1]))
            context = layer("attention")([layer("query")(h), memory], mask=[None, seen])
            h = layer("attended")(layer("context_and_state")([context, h]))
            return ops.log_softmax(layer("logits")(h)), new

        ids, scores = beam_search(step, first, **self.search)
        return {"ids": ids[:, 0], "scores": scores[:, 0]}

    def compute_output_spec(self, inputs):
        rows = inputs.shape[0]
        shape = (rows, self.search["length"])
        return {
            "ids": keras.KerasTensor(shape, dtype="int32"),
            "scores": keras.KerasTensor((rows,), dtype="float32"),
        }

    def get_config(self):
        model = keras.saving.serialize_keras_object(self.model)
        return {**super().get_config(), "model": model, **self.search}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        model = keras.saving.deserialize_keras_object(config.pop("model"))
        return cls(model, **config)
