"""From a plain model to its Bayesian twin, and back."""

import inspect
import math
import numbers
import tempfile

import keras
import numpy as np

from ..ops.arguments import integer
from . import (
    attention,
    conv,
    conv_transpose,
    dense,
    depthwise_conv,
    einsum_dense,
    embedding,
)
from .base import variational_layers
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
}
# What a plain layer's arguments call the weight that is `kernel` here.
KERNELS = {
    keras.layers.DepthwiseConv2D: "depthwise",
    keras.layers.Embedding: "embeddings",
}
PROJECTIONS = (
    "_query_dense",
    "_key_dense",
    "_value_dense",
    "_gate_dense",
    "_output_dense",
)
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

    Each dense layer, einsum layer, convolution, embedding and multi-head attention
    becomes the one of this package that has a normal distribution over its kernel,
    N(μ, σ²) with μ the plain kernel; biases stay points. σ is one number or, by the
    rule of MOPED, in proportion to the weight:

        σ = δ |μ|.

    All else stays as it is: names, other layers and their weights, shared layers,
    nested models, which layers are frozen. Regularizers and constraints of a kernel
    are then those of μ. At the posterior mean (`kzoo.layers.PosteriorMean`) the twin
    computes what the plain model does.

    Reference: Krishnan, Subedar, Tickoo, "Specifying Weight Priors in Bayesian Deep
    Neural Networks with Empirical Bayes", 2020. https://arxiv.org/abs/1906.05323
    (The rule for σ; its prior around the plain weights is not taken over.)

    Args:
        model: A built Sequential or functional `keras.Model`. Layers inside of
            other layers, such as `keras.layers.TimeDistributed`, and layers of classes
            derived from Keras's stay as they are.
        method: The estimator: `"flipout"`, `"reparameterization"` or
            `"local_reparameterization"`.
        stddev: σ of all weights. Defaults to 0.05.
        relative_stddev: δ, in place of `stddev`.
        kernel_prior_fn: Makes the priors of the kernels, as the layers take it.
        num_examples: N, the number of training examples.
        seed: Integer, from which each layer gets a seed of its own; or None.

    Returns:
        A `keras.Model`, not compiled.

    Raises:
        ValueError: If an argument is out of range, or no layer has a counterpart.

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
    is_number = isinstance(scale, numbers.Real) and 0 < scale < math.inf
    if len(given) > 1 or not is_number:
        raise ValueError(
            "expected `stddev` or `relative_stddev`, a number above 0. Received: "
            f"stddev={stddev!r}, relative_stddev={relative_stddev!r}"
        )
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
        kernel = KERNELS.get(type(layer), "kernel")
        arguments["kernel_posterior_fn"] = MeanFieldNormal(
            loc_regularizer=_kept(layer, f"{kernel}_regularizer"),
            loc_constraint=_kept(layer, f"{kernel}_constraint"),
        )
        arguments["bias_posterior_fn"] = None
        if config.get("use_bias", getattr(layer, "bias", None) is not None):
            arguments["bias_posterior_fn"] = MeanFieldNormal(
                is_singular=True,
                loc_regularizer=_kept(layer, "bias_regularizer"),
                loc_constraint=_kept(layer, "bias_constraint"),
            )
        return getattr(file, kind + METHODS[method])(
            **arguments,
            kernel_prior_fn=kernel_prior_fn,
            num_examples=num_examples,
            seed=None if seed is None else int(seeds.integers(2**31)),
        )

    def fill(plain, bayesian):
        mean = numpy(_kernel(plain)).astype("float64")
        std = np.full_like(mean, scale) if name == "stddev" else scale * np.abs(mean)
        loc, untransformed = bayesian.kernel.variables[:2]
        loc.assign(mean)
        untransformed.assign(inverse_softplus(std, bayesian.kernel.dtype))
        if bayesian.bias is not None:
            bayesian.bias.variables[0].assign(numpy(plain.bias))

    return _converted(model, convert, fill)


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
        one = getattr(layer, "_query_dense", layer)  # Attention's are all alike.
        if "use_bias" in takes:
            arguments["use_bias"] = one.bias is not None
        elif "bias_axes" in takes and one.bias is None:
            arguments["bias_axes"] = None
        kernel = KERNELS.get(plain, "kernel")
        for name, part in ((kernel, "kernel"), ("bias", "bias")):
            function = getattr(one, f"{part}_posterior_fn")
            if isinstance(function, MeanFieldNormal):
                arguments[f"{name}_regularizer"] = function.loc_regularizer
                arguments[f"{name}_constraint"] = function.loc_constraint
        return plain(**arguments)

    def fill(bayesian, plain):
        _kernel(plain).assign(numpy(bayesian.kernel_posterior.mean()))
        if bayesian.bias is not None:
            plain.bias.assign(numpy(bayesian.bias_posterior.mean()))

    return _converted(model, convert, fill)


def _converted(model, convert, fill):
    """A copy of a model, some of its layers converted, with the weights.

    Args:
        model: A Sequential or functional model.
        convert: Function of a layer that returns its counterpart, or None to copy it.
        fill: Function of a layer and its built counterpart that sets its weights; of
            attention, called for each projection.
    """
    built = isinstance(model, keras.Sequential) and model.built
    if not built and not getattr(model, "inputs", None):
        raise ValueError(
            "expected a built Sequential or functional model. "
            f"Received: {type(model).__name__} {model.name!r}"
        )
    converted, copied = [], []

    def clone(layer):
        if not isinstance(layer, keras.layers.Layer):  # An operation of keras.ops.
            return type(layer).from_config(layer.get_config())
        found = convert(layer)
        pairs = copied if found is None else converted
        if found is None:
            found = type(layer).from_config(layer.get_config())
        found.trainable = layer.trainable
        pairs.append((layer, found))
        return found

    made = keras.models.clone_model(model, clone_function=clone, recursive=True)
    if not converted:
        kinds = sorted({type(layer).__name__ for layer in model._flatten_layers()})
        raise ValueError(
            "expected a model with at least one layer that has a counterpart: "
            f"{[c.__name__ for c in COUNTERPARTS]} or ours. Received: {model.name}, "
            f"with {kinds}"
        )
    for layer, found in converted:
        projections = [name for name in PROJECTIONS if hasattr(layer, name)]
        for name in projections:
            fill(getattr(layer, name), getattr(found, name))
        if not projections:
            fill(layer, found)
    for layer, found in copied:
        pairs = zip(layer._flatten_layers(), found._flatten_layers(), strict=True)
        for one, other in pairs:
            _copy_state(one, other)
    return made


def _kept(layer, name):
    """An argument of a layer; attention keeps those of its projections by itself."""
    return getattr(layer, f"_{name}", None) or getattr(layer, name, None)


def _kernel(plain):
    """The variable that is the kernel of a plain layer."""
    return plain.embeddings if hasattr(plain, "embeddings") else plain.kernel


def _copy_state(layer, other):
    """Gives a layer what another one would save: weights, statistics, vocabularies."""
    store = {}
    layer.save_own_variables(store)
    other.load_own_variables({name: numpy(value) for name, value in store.items()})
    if hasattr(layer, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            layer.save_assets(folder)
            other.load_assets(folder)


def numpy(value):
    """A copy, which no training step can take back."""
    return np.array(keras.ops.convert_to_numpy(value))
