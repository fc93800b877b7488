"""From a plain model to its Bayesian twin, and back."""

import inspect
import warnings

import keras
import numpy as np

from ..conversion import converted, has_plain_kernels, holders, numpy
from ..ops.arguments import integer, positive
from . import (
    attention,
    conv,
    conv_transpose,
    dense,
    depthwise_conv,
    einsum_dense,
    embedding,
    gru,
    lstm,
    simple_rnn,
)
from .base import VariationalLayer, variational_layers
from .distributions import STANDARD_NORMAL, MeanFieldNormal, inverse_softplus

EINSUM_ARGUMENTS = ("equation", "output_shape", "bias_axes")
EMBEDDING_ARGUMENTS = ("input_dim", "output_dim", "mask_zero")
ATTENTION_ARGUMENTS = (
    "num_heads",
    "key_dim",
    "value_dim",
    "dropout",
    "output_shape",
    "attention_axes",
    "sliding_window",
    "use_gate",
)
RECURRENT_ARGUMENTS = (
    "units",
    "dropout",
    "recurrent_dropout",
    "return_sequences",
    "return_state",
    "go_backwards",
    "stateful",
    "unroll",
    "zero_output_for_mask",
)
GRU_ARGUMENTS = (*RECURRENT_ARGUMENTS, "recurrent_activation", "reset_after")
LSTM_ARGUMENTS = (*RECURRENT_ARGUMENTS, "recurrent_activation", "unit_forget_bias")
# Plain layer -> (file of its counterparts, their common name, arguments they share)
COUNTERPARTS = {
    keras.layers.Dense: (dense, "Dense", ("units",)),
    keras.layers.EinsumDense: (einsum_dense, "EinsumDense", EINSUM_ARGUMENTS),
    keras.layers.Conv1D: (conv, "Conv1D", conv.OF_PLAIN),
    keras.layers.Conv2D: (conv, "Conv2D", conv.OF_PLAIN),
    keras.layers.Conv3D: (conv, "Conv3D", conv.OF_PLAIN),
    keras.layers.Conv2DTranspose: (
        conv_transpose,
        "Conv2DTranspose",
        conv_transpose.OF_PLAIN,
    ),
    keras.layers.DepthwiseConv2D: (
        depthwise_conv,
        "DepthwiseConv2D",
        depthwise_conv.OF_PLAIN,
    ),
    keras.layers.Embedding: (embedding, "Embedding", EMBEDDING_ARGUMENTS),
    keras.layers.MultiHeadAttention: (
        attention,
        "MultiHeadAttention",
        ATTENTION_ARGUMENTS,
    ),
    keras.layers.SimpleRNN: (simple_rnn, "SimpleRNN", RECURRENT_ARGUMENTS),
    keras.layers.GRU: (gru, "GRU", GRU_ARGUMENTS),
    keras.layers.LSTM: (lstm, "LSTM", LSTM_ARGUMENTS),
}
RECURRENT = (keras.layers.SimpleRNN, keras.layers.GRU, keras.layers.LSTM)
# What a plain layer's arguments call its weights, where not by the names used here.
ARGUMENTS = {
    (keras.layers.DepthwiseConv2D, "kernel"): "depthwise",
    (keras.layers.Embedding, "kernel"): "embeddings",
    **{(layer, "recurrent_kernel"): "recurrent" for layer in RECURRENT},
}
METHODS = {
    "flipout": "Flipout",
    "reparameterization": "Reparameterization",
    "local_reparameterization": "LocalReparameterization",
}
COMMON = ("name", "dtype")


def to_bayesian(
    model,
    method="flipout",
    *,
    stddev=None,
    relative_stddev=None,
    kernel_prior_fn=STANDARD_NORMAL,
    num_examples=None,
    seed=None,
):
    """Makes the Bayesian twin of a plain model.

    Each dense layer, einsum layer, convolution, embedding, multi-head attention and
    recurrent layer, also those of a `keras.layers.Bidirectional`, becomes the one of
    this package that has a normal distribution over its kernels, N(μ, σ²) with μ the
    plain kernel; biases stay points. σ is one number or, by the rule of MOPED, in
    proportion to the weight:

        σ = δ |μ|.

    All else stays as it is: names, other layers and their weights, shared layers,
    nested models, which layers are frozen (their twins draw too, from posteriors that
    stay as they are). Regularizers and constraints of a kernel
    are then those of μ. At the posterior mean (`kzoo.layers.PosteriorMean`) the twin
    computes what the plain model does.

    Reference: Krishnan, Subedar, Tickoo, "Specifying Weight Priors in Bayesian Deep
    Neural Networks with Empirical Bayes", 2020. https://arxiv.org/abs/1906.05323
    (The rule for σ; its prior around the plain weights is not taken over.)

    Args:
        model: A built Sequential or functional `keras.Model`. Layers inside of
            other layers, such as `keras.layers.TimeDistributed`, cells in a
            `keras.layers.RNN`, and layers of classes derived from Keras's stay as they
            are; those with kernels are named by a warning.
        method: The estimator: `"flipout"`, `"reparameterization"` or
            `"local_reparameterization"`, which recurrent layers do not have.
        stddev: σ of all weights. Defaults to 0.05.
        relative_stddev: δ, in place of `stddev`.
        kernel_prior_fn: Makes the priors of the kernels, as the layers take it.
        num_examples: N, the number of training examples.
        seed: Integer, from which each layer gets a seed of its own; or None.

    Returns:
        A `keras.Model`, not compiled.

    Raises:
        ValueError: If an argument is out of range, if no layer has a counterpart, or a
            recurrent layer none by the method.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import PosteriorMean, to_bayesian
    >>> model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    >>> bayesian = to_bayesian(model, relative_stddev=0.1, num_examples=1000)
    >>> x = np.ones((2, 5), "float32")
    >>> y = PosteriorMean(bayesian).predict(x, verbose=0)
    >>> bool(np.allclose(y, model.predict(x, verbose=0), atol=1e-6))
    True
    """
    if method not in METHODS:
        raise ValueError(
            f"expected `method` to be one of {list(METHODS)}. "
            f"Received: method={method!r}"
        )
    given = {"stddev": stddev, "relative_stddev": relative_stddev}
    given = {n: value for n, value in given.items() if value is not None}
    ((name, scale),) = given.items() if len(given) == 1 else [("stddev", 0.05)]
    if len(given) > 1:
        raise ValueError(
            "expected `stddev` or `relative_stddev`. Received: "
            f"stddev={stddev!r}, relative_stddev={relative_stddev!r}"
        )
    scale = positive(name, scale)
    if seed is not None:
        seed = integer("seed", seed, 0)
    seeds = np.random.default_rng(seed)

    def convert(layer):
        if type(layer) not in COUNTERPARTS:
            return None
        file, kind, shared = COUNTERPARTS[type(layer)]
        config = layer.get_config()
        arguments = {n: config[n] for n in (*COMMON, *shared)}
        if "activation" in config:
            arguments["activation"] = layer.activation
        arguments["activity_regularizer"] = _kept(layer, "activity_regularizer")
        made = getattr(file, kind + METHODS[method], None)
        if made is None:
            raise ValueError(
                "expected `method` to be 'flipout' or 'reparameterization': a layer "
                f"{kind} holds its weights over a sequence, which outputs that are "
                f"drawn at each step do not. Received: method={method!r}"
            )
        for part in _kernels(type(layer)):
            plain = ARGUMENTS.get((type(layer), part), part)
            arguments[f"{part}_posterior_fn"] = MeanFieldNormal(
                loc_regularizer=_kept(layer, f"{plain}_regularizer"),
                loc_constraint=_kept(layer, f"{plain}_constraint"),
            )
            arguments[f"{part}_prior_fn"] = kernel_prior_fn
        arguments["bias_posterior_fn"] = None
        if config.get("use_bias", getattr(layer, "bias", None) is not None):
            arguments["bias_posterior_fn"] = MeanFieldNormal(
                is_singular=True,
                loc_regularizer=_kept(layer, "bias_regularizer"),
                loc_constraint=_kept(layer, "bias_constraint"),
            )
        return made(
            **arguments,
            num_examples=num_examples,
            seed=None if seed is None else int(seeds.integers(2**31)),
        )

    def fill(variable, weight):
        mean = numpy(variable)
        loc, *untransformed = weight.variables[:2]
        loc.assign(mean)
        if weight.kind == "bias":
            return
        mean = mean.astype("float64")
        std = np.full_like(mean, scale) if name == "stddev" else scale * np.abs(mean)
        untransformed[0].assign(inverse_softplus(std, weight.dtype))

    made, copied = converted(model, convert, _by_weight(fill), COUNTERPARTS)
    left = [layer for layer in copied if has_plain_kernels(layer, VariationalLayer)]
    if left:
        names = ", ".join(f"{type(w).__name__} {w.name!r}" for w in left)
        warnings.warn(
            f"to_bayesian: layers without a counterpart keep their weights as they "
            f"are, without a distribution: {names}",
            stacklevel=2,
        )
    return made


def from_bayesian(model):
    """Makes the plain model that a Bayesian one is at the means of its posteriors.

    The inverse of `to_bayesian`: variational layers become Keras's own, whose kernels
    and biases are the posteriors' means.

    Args:
        model: A built Sequential or functional `keras.Model` with variational layers.

    Returns:
        A `keras.Model`, not compiled.

    Raises:
        ValueError: If the model has no variational layers.

    Example:

    >>> import keras
    >>> from kzoo.layers import DenseFlipout, from_bayesian
    >>> model = keras.Sequential([keras.Input((5,)), DenseFlipout(3)])
    >>> [type(layer).__name__ for layer in from_bayesian(model).layers]
    ['Dense']
    """
    variational_layers(model)  # Or it raises.
    plain_classes = {
        getattr(file, kind + estimator): (plain, shared)
        for plain, (file, kind, shared) in COUNTERPARTS.items()
        for estimator in METHODS.values()
        if hasattr(file, kind + estimator)
    }

    def convert(layer):
        if type(layer) not in plain_classes:
            return None
        plain, shared = plain_classes[type(layer)]
        takes = inspect.signature(plain).parameters
        config = layer.get_config()
        arguments = {n: config[n] for n in (*COMMON, *shared)}
        if "activation" in takes:
            arguments["activation"] = layer.activation
        arguments["activity_regularizer"] = _kept(layer, "activity_regularizer")
        one = holders(layer)[0]  # Attention's projections are all alike.
        if "use_bias" in takes:
            arguments["use_bias"] = one.bias is not None
        elif "bias_axes" in takes and one.bias is None:
            arguments["bias_axes"] = None
        for part in (*_kernels(plain), "bias"):
            of_plain = ARGUMENTS.get((plain, part), part)
            function = getattr(one, f"{part}_posterior_fn")
            if isinstance(function, MeanFieldNormal):
                arguments[f"{of_plain}_regularizer"] = function.loc_regularizer
                arguments[f"{of_plain}_constraint"] = function.loc_constraint
        return plain(**arguments)

    def fill(weight, variable):
        variable.assign(numpy(weight.posterior.mean()))

    return converted(model, convert, _by_weight(fill), COUNTERPARTS)[0]


def _by_weight(fill):
    """Makes of a function of two weights one of the two layers that have them."""

    def of_layers(layer, found):
        for pair in zip(holders(layer), holders(found), strict=True):
            for weights in zip(*map(_weights, pair), strict=True):
                fill(*weights)

    return of_layers


def _kept(layer, name):
    """An argument of a layer; attention keeps those of its projections by itself."""
    return getattr(layer, f"_{name}", None) or getattr(layer, name, None)


def _kernels(plain):
    """The names of the kernels of a plain class's counterparts."""
    return ("kernel", "recurrent_kernel") if plain in RECURRENT else ("kernel",)


def _weights(holder):
    """The kernels and the bias that a plain or variational layer has, in order."""
    names = ("embeddings", "kernel", "recurrent_kernel", "bias")
    weights = [getattr(holder, name, None) for name in names]
    return [weight for weight in weights if weight is not None]
