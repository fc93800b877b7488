"""From models of `tfp.layers` and edward2, on legacy Keras, to their twins here."""

import keras
import numpy as np

from .base import VariationalLayer
from .distributions import MeanFieldNormal, Normal, inverse_softplus
from .weight import VariationalWeight


def load_legacy_weights(model, legacy_model):
    """Gives a model the weights of its twin in legacy Keras (`tf_keras`).

    For models with layers of `tfp.layers`, or of edward2 with its `trainable_normal`
    initializers: a posterior here gets the means and standard deviations of the one
    there, however either keeps them (edward2's are softplus(ρ) + 1e-7, those here
    ε + softplus(ρ)). All other layers get their weights as they are, the statistics of
    batch normalization too.

    Layers that have weights are matched in the order of `model.layers`, those of a
    model inside at its place. All is looked at before anything is assigned. Priors,
    `num_examples` and the optimizer's state are not taken over: the divergences of
    `tfp.layers` are not scaled unless their functions do that.

    A file of legacy Keras is read by legacy Keras. Where its weights alone were saved,
    or it was saved with functions that do not load, make the legacy model by the code
    that it was made by, then

        legacy_model.load_weights("weights.h5")

    and else

        legacy_model = tf_keras.models.load_model("model.h5", custom_objects={...})

    On the TensorFlow backend only. Recurrent layers are not taken.

    Args:
        model: A built `keras.Model`, whose posteriors are `MeanFieldNormal` (the
            default) or TensorFlow Probability's `default_mean_field_normal_fn`.
        legacy_model: A built `tf_keras.Model`.

    Raises:
        ValueError: If the weights of a layer do not fit, or it has others such as a
            trained prior's: the first of them is named, and `model` is as it was. On
            another backend; if one is not a built model.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import tensorflow_probability as tfp
    >>> import tf_keras
    >>> from kzoo.layers import DenseFlipout, load_legacy_weights
    >>> legacy = tf_keras.Sequential([tf_keras.Input((5,)), tfp.layers.DenseFlipout(3)])
    >>> model = keras.Sequential([keras.Input((5,)), DenseFlipout(3)])
    >>> load_legacy_weights(model, legacy)
    >>> ours, theirs = (m.layers[0].kernel_posterior for m in (model, legacy))
    >>> bool(np.allclose(ours.mean(), theirs.mean()))
    True
    >>> bool(np.allclose(ours.stddev(), theirs.stddev()))
    True
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "expected the TensorFlow backend, where legacy models run. "
            f"Received: {keras.backend.backend()!r}"
        )
    import tf_keras

    for name, given, kind, what in (
        ("model", model, keras.Model, "keras.Model"),
        ("legacy_model", legacy_model, tf_keras.Model, "tf_keras.Model"),
    ):
        if not isinstance(given, kind) or not given.built:
            raise ValueError(
                f"expected `{name}` to be a built `{what}`. Received: {given!r}"
            )
    ours = _with_weights(model, keras.Model)
    theirs = _with_weights(legacy_model, tf_keras.Model)
    found = []
    for layer, legacy in zip(ours, theirs, strict=False):
        try:
            found += _pairs(layer, legacy, tf_keras.layers.Layer)
        except ValueError as error:
            raise ValueError(
                f"layer {layer.name!r} does not fit the legacy model's "
                f"{legacy.name!r}: {error}"
            ) from None
    if len(ours) != len(theirs):
        longer = max(ours, theirs, key=len)
        raise ValueError(
            f"expected as many layers with weights as the legacy model has, "
            f"{len(theirs)}. Received: {len(ours)}; the first without a counterpart is "
            f"{longer[min(len(ours), len(theirs))].name!r}"
        )
    for variable, value in found:
        variable.assign(value)
    for layer in ours:
        if hasattr(layer, "finalize_state"):  # Normalization computes with constants.
            layer.finalize_state()


def _with_weights(model, kind):
    """The layers of a model that have weights, those of models inside it too."""
    found = []
    for layer in model.layers:
        if isinstance(layer, kind):
            found += _with_weights(layer, kind)
        elif layer.weights:
            found.append(layer)
    return found


def _pairs(layer, legacy, legacy_layer):
    """Pairs of a layer's variables and what they get, or a ValueError."""
    if not isinstance(layer, VariationalLayer):
        return _fitting(layer.weights, [w.numpy() for w in legacy.weights])
    found, used = [], []
    for weight in vars(layer).values():
        if isinstance(weight, VariationalWeight):
            posterior, variables = _posterior(legacy, weight.kind, legacy_layer)
            found += _of_posterior(layer, weight, posterior)
            used += [id(variable) for variable in variables]
    left = [w.name for w in legacy.weights if id(w) not in used]
    if left:
        raise ValueError(
            f"expected no weights but of its posteriors. Received: {sorted(left)}"
        )
    return found


def _posterior(legacy, kind, legacy_layer):
    """What a legacy layer draws a weight from, a distribution or a variable.

    Returns:
        It and its variables; or None and an empty list.
    """
    posterior = getattr(legacy, f"{kind}_posterior", None)
    if posterior is not None:  # Of tfp.layers.
        return posterior, posterior.variables
    for name in ("kernel", "embeddings") if kind == "kernel" else (kind,):
        # edward2's initializers are layers with variables, that make distributions.
        initializer = getattr(legacy, f"{name}_initializer", None)
        if isinstance(initializer, legacy_layer) and initializer.weights:
            drawn = initializer(initializer.weights[0].shape)
            return drawn.distribution, initializer.weights
        variable = getattr(legacy, name, None)
        if variable is not None:
            return variable, [variable]
    return None, []


def _of_posterior(layer, weight, posterior):
    """Pairs of a posterior's variables here, and what they get of the legacy one."""
    from .tfp import from_tfp

    function = getattr(layer, f"{weight.kind}_posterior_fn")
    module = getattr(function, "__module__", "")
    is_tfp = module.startswith("tensorflow_probability.")
    if not isinstance(function, MeanFieldNormal) and not is_tfp:
        raise ValueError(
            f"expected `{weight.kind}_posterior_fn` to be a `MeanFieldNormal`. "
            f"Received: {function!r}"
        )
    count = 1 if weight.posterior.is_point else 2
    variables = weight.variables[:count]
    what = f"a {weight.kind} " + ("that is a point" if count == 1 else "with a scale")
    if posterior is None:
        raise ValueError(f"expected {what}. Received: none")
    if hasattr(posterior, "numpy"):
        values = [posterior.numpy()]
    else:
        shape = (*posterior.batch_shape, *posterior.event_shape)
        posterior = from_tfp(posterior, shape, weight.dtype, is_prior=False)
        if not isinstance(posterior, Normal):
            raise ValueError(
                f"expected {what}, a normal distribution of independent entries. "
                f"Received: {posterior}"
            )
        values = [np.array(posterior.mean())]
        if not posterior.is_point:
            stddev = np.array(posterior.stddev())
            values.append(inverse_softplus(stddev, weight.dtype))
    if len(values) != count:
        received = "a point" if len(values) == 1 else "a distribution with a scale"
        raise ValueError(f"expected {what}. Received: {received}")
    return _fitting(variables, values)


def _fitting(variables, values):
    """Pairs of variables and values, or a ValueError if their shapes differ."""
    expected = [tuple(variable.shape) for variable in variables]
    received = [tuple(value.shape) for value in values]
    if expected != received:
        raise ValueError(f"expected weights of shapes {expected}. Received: {received}")
    return list(zip(variables, values, strict=True))
