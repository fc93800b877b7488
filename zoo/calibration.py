"""Temperature scaling: from a classifier to one whose confidence is right."""

import math

import keras
import numpy as np
from scipy import optimize, special

from ..layers import PosteriorMean, PosteriorSamples, TemperatureScaling
from ..layers.ops.arguments import integer
from ..layers.variational.mode import can_sample
from .metrics.inputs import label_probabilities
from .predictive import (
    check_samples,
    classification,
    ending_in,
    split_off_temperature,
)

# Temperatures outside of these bounds stand for none.
COLDEST, HOTTEST = 1e-3, 1e3


def fit_temperature(model, x, y=None, *, samples=None, batch_size=256):
    """Gives a classifier the temperature with the least NLL on validation data.

    With z the logits of N examples with labels y, of an ensemble the log of its
    members' mean probability, the temperature T minimises

        NLL(T) = -(1/N) sum_n log softmax(z_n / T)(y_n).

    That is convex in 1/T, and where it has a minimum is where the labels' logits are
    what the model expects of them,

        sum_n z_n(y_n) = sum_n sum_c softmax(z_n / T)(c) z_n(c).

    Give it data that the model was not trained on: on its training data a network is
    nearly always right, and no temperature could know where it errs elsewhere.

    Reference: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks",
    2017. https://arxiv.org/abs/1706.04599
    Rahaman, Thiery, "Uncertainty Quantification and Deep Ensembles", 2021, for
    ensembles: first average, then calibrate. https://arxiv.org/abs/2007.08792

    Args:
        model: A Sequential or functional `keras.Model` that ends in logits `[B, C]`. A
            temperature that it already has is left out and fitted anew.
        x: The inputs; or batches `(x, y)`, as a `tf.data.Dataset` has them.
        y: The labels, as indices `[N]` or `[N, 1]`, or one-hot, `[N, C]`; None if x
            has them.
        samples: Of a model with distributions over its weights, or with
            `kzoo.layers.MonteCarloDropout`: the number of draws whose mean is
            calibrated. Defaults to none, for the posterior's mean.
        batch_size: Number of examples that are predicted at a time.

    Returns:
        A `keras.Model`, not compiled: the model with a
        `kzoo.layers.TemperatureScaling` behind it, and with its weights, not copies of
        them. `kzoo.zoo.predictive.classification` says what of its answers, and of what
        `kzoo.zoo.export` writes, is calibrated.

    Raises:
        ValueError: If the model does not end in logits, batches are no pairs (x, y),
            labels are none of its classes, or no temperature is best: if the label is
            the most probable class of every example, the colder the better.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.zoo import fit_temperature
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Identity()])
    >>> x = np.array([[6.0, 0.0]] * 4)  # It says 0.9975; three of four are right.
    >>> calibrated = fit_temperature(model, x, y=np.array([0, 0, 0, 1]))
    >>> probabilities = keras.ops.softmax(calibrated.predict(x, verbose=0))
    >>> round(float(probabilities[0, 0]), 6)
    0.75
    """
    if not getattr(model, "inputs", None):
        raise ValueError(
            "expected a built Sequential or functional model. "
            f"Received: {type(model).__name__} {model.name!r}"
        )
    classification(model)  # Or it raises.
    before, _ = split_off_temperature(model)
    predictor = _predictor(before, samples)
    pairs = [
        (keras.ops.convert_to_numpy(predictor.predict_on_batch(inputs)), labels)
        for inputs, labels in _batches(x, y, integer("batch_size", batch_size))
    ]
    if not pairs:
        raise ValueError("expected examples to calibrate with. Received: none")
    logits, labels = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    layer = TemperatureScaling(optimal_temperature(logits, labels), name="temperature")
    return ending_in(layer(before.outputs[0]), before)


def optimal_temperature(logits, labels):
    """Finds the temperature of `fit_temperature` for logits that are there already.

    Args:
        logits: z, `[N, C]`; or members' logits, `[N, M, C]`, whose probabilities are
            averaged first.
        labels: Class indices, `[N]` or `[N, 1]`, or one-hot, `[N, C]`.

    Returns:
        T, a float.

    Raises:
        ValueError: If logits are not finite, labels do not fit, or there is no minimum.

    Example:

    >>> import numpy as np
    >>> from kzoo.zoo.calibration import optimal_temperature
    >>> logits = [[np.log(3.0), 0.0]] * 4
    >>> round(optimal_temperature(logits, [0, 0, 0, 1]), 6)  # says 3/4, right
    1.0
    """
    z = special.log_softmax(np.asarray(logits, "float64"), axis=-1)
    if z.ndim == 3:
        z = special.logsumexp(z, axis=1) - math.log(z.shape[1])
    if z.ndim != 2 or not np.isfinite(z).all():
        raise ValueError(
            "expected finite logits [N, C] or [N, M, C]. Received: logits of shape "
            f"{np.shape(logits)}, {np.sum(~np.isfinite(z))} of them not finite"
        )
    y = keras.ops.convert_to_numpy(label_probabilities(labels, z)).astype("float64")
    if not np.isfinite(y).all():
        raise ValueError(
            f"expected labels of {z.shape[1]} classes. Received: {np.unique(labels)}"
        )
    of_labels = np.sum(y * z, axis=1).mean()

    def slope(log_temperature):
        """The derivative of the NLL by 1/T, which falls with the temperature."""
        probs = special.softmax(z * math.exp(-log_temperature), axis=1)
        return np.sum(probs * z, axis=1).mean() - of_labels

    bounds = math.log(COLDEST), math.log(HOTTEST)
    if not slope(bounds[0]) > 0 > slope(bounds[1]):
        right = np.mean(np.argmax(z, axis=1) == np.argmax(y, axis=1))
        raise ValueError(
            "expected labels that one temperature is best for: some of them not the "
            "most probable class, and their logits above the mean. Received: "
            f"{len(z)} labels, {right:.1%} of them the most probable class"
        )
    return math.exp(optimize.brentq(slope, *bounds, xtol=1e-14))


def _predictor(model, samples):
    """A compiled model of the logits, or of those of all draws, `[B, K, C]`."""
    if samples is not None:
        found = PosteriorSamples(model, check_samples(samples, model), seed=0)
    elif can_sample(model):
        found = PosteriorMean(model)
    else:
        found = ending_in(model.outputs[0], model)  # The user's stays as it is.
    found.compile(jit_compile=keras.backend.backend() == "jax")
    return found


def _batches(x, y, size):
    """Yields batches of inputs and labels."""
    if y is None:
        for pair in x:  # Tensors of TensorFlow's, for one, of whatever backend.
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                types = keras.tree.map_structure(lambda part: type(part).__name__, pair)
                raise ValueError(
                    "expected labels `y`, or `x` of batches that are pairs (x, y). "
                    f"Received: a batch {types}"
                )
            yield keras.tree.map_structure(np.asarray, pair)
        return
    rows = {len(array) for array in keras.tree.flatten(x)} | {len(y)}
    if len(rows) > 1:
        raise ValueError(
            f"expected as many labels as examples. Received: {sorted(rows)} rows"
        )
    for i in range(0, len(y), size):
        yield keras.tree.map_structure(lambda a, i=i: a[i : i + size], (x, y))
