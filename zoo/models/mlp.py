"""Multilayer perceptrons: classifiers, and regressors that predict their variance."""

from functools import partial

import keras

from ...layers import DenseFlipout, MeanAndVariance, NormalPrior
from ...layers.ops.arguments import integer
from ..registry import register_model
from .posterior import normal_around


def mlp(
    features,
    targets=1,
    *,
    hidden=(64, 64),
    activation="relu",
    input_mean=None,
    input_variance=None,
    loc=0.0,
    scale=1.0,
    floor=1e-6,
    dense=keras.layers.Dense,
    name="mlp",
):
    """Builds a network that predicts the mean and the variance of each target.

    With x the inputs, made to mean 0 and variance 1 if theirs are given,

        h_0 = x,    h_i = φ(h_{i-1} W_i + b_i),    (a, b) = h_L W + c,
        μ = loc + scale a,    σ² = scale² (softplus(b) + floor):

    a normal distribution whose noise may differ from input to input. The method that
    the weights follow comes in with the layer factory `dense`.

    Reference: Nix, Weigend, "Estimating the mean and variance of the target
    probability distribution", 1994. https://doi.org/10.1109/ICNN.1994.374138

    Args:
        features: Number of inputs.
        targets: T, the number of targets.
        hidden: Sizes of the hidden layers.
        activation: φ.
        input_mean: Means of the inputs, one each. None: inputs go in as they are.
        input_variance: Their variances.
        loc: Mean of the targets, as `kzoo.layers.MeanAndVariance` takes it.
        scale: Their standard deviation, likewise.
        floor: The least variance, likewise.
        dense: Makes the dense layers: takes `keras.layers.Dense`'s arguments.
        name: Name of the model.

    Returns:
        A `keras.Model` from raw `features` to means and variances `[B, T, 2]`, for the
        loss `kzoo.zoo.losses.GaussianNegativeLogLikelihood`;
        `kzoo.zoo.predictive.regression` gives them names.

    Raises:
        ValueError: If a size is no integer of at least 1, or only one of `input_mean`
            and `input_variance` is given, or they are not one number an input.

    Example:

    >>> from kzoo.zoo.models.mlp import mlp
    >>> mlp(features=10, hidden=(32,)).count_params()  # 11 * 32 + 33 * 2
    418
    """
    outputs = 2 * integer("targets", targets)
    inputs, x = _layers(
        features, hidden, activation, input_mean, input_variance, dense, outputs, "head"
    )
    x = MeanAndVariance(loc, scale, floor, name="mean_and_variance")(x)
    return keras.Model(inputs, x, name=name)


def mlp_classifier(
    features,
    classes,
    *,
    hidden=(64, 64),
    activation="relu",
    input_mean=None,
    input_variance=None,
    dense=keras.layers.Dense,
    name="mlp_classifier",
):
    """Builds a network that gives each class a logit.

    With x the inputs, made to mean 0 and variance 1 if theirs are given,

        h_0 = x,    h_i = φ(h_{i-1} W_i + b_i),    logits = h_L W + c.

    The method that the weights follow comes in with the layer factory `dense`.

    Reference: Rumelhart, Hinton, Williams, "Learning representations by
    back-propagating errors", 1986. https://doi.org/10.1038/323533a0

    Args:
        features: Number of inputs.
        classes: C, the number of classes.
        hidden: Sizes of the hidden layers.
        activation: φ.
        input_mean: Means of the inputs, one each. None: inputs go in as they are.
        input_variance: Their variances.
        dense: Makes the dense layers: takes `keras.layers.Dense`'s arguments.
        name: Name of the model.

    Returns:
        A `keras.Model` from raw `features` to logits `[B, C]`.

    Raises:
        ValueError: If a size is no integer of at least 1, or only one of `input_mean`
            and `input_variance` is given, or they are not one number an input.

    Example:

    >>> from kzoo.zoo.models.mlp import mlp_classifier
    >>> mlp_classifier(features=30, classes=2, hidden=(16,)).count_params()
    530
    """
    classes = integer("classes", classes)
    inputs, logits = _layers(
        features,
        hidden,
        activation,
        input_mean,
        input_variance,
        dense,
        classes,
        "logits",
    )
    return keras.Model(inputs, logits, name=name)


def _layers(features, hidden, activation, mean, variance, dense, outputs, last):
    """The inputs and outputs of all dense layers, the last one of which has a name."""
    features = integer("features", features)
    hidden = [integer("hidden", size) for size in hidden]
    given = [s for s in (mean, variance) if s is not None]
    if len(given) == 1 or any(len(s) != features for s in given):
        raise ValueError(
            f"expected `input_mean` and `input_variance` of {features} numbers each, "
            f"or neither. Received: input_mean={mean!r}, input_variance={variance!r}"
        )
    x = inputs = keras.Input((features,), name="features")
    if given:
        mean, variance = ([float(v) for v in s] for s in given)
        x = keras.layers.Normalization(mean=mean, variance=variance, name="scale")(x)
    for i, size in enumerate(hidden):
        x = dense(size, activation=activation, name=f"hidden{i}")(x)
    # As exact as the weights, also under mixed precision.
    dtype = keras.config.dtype_policy().variable_dtype
    return inputs, dense(outputs, dtype=dtype, name=last)(x)


# Of the training split, as raw inputs and targets have them.
_DIABETES = {
    "features": 10,
    "input_mean": [48.43, 1.427, 26.65, 94.43, 189.4, 116.2, 49.89, 4.038, 4.636, 91.8],
    "input_variance": [
        168.7,
        0.2447,
        19.38,
        190.0,
        1202.0,
        917.2,
        157.3,
        1.447,
        0.2426,
        121.6,
    ],
    "loc": 153.3,
    "scale": 75.0,
}
_PAPER = "https://doi.org/10.1109/ICNN.1994.374138"


@register_model(
    "mlp_regressor",
    description="Perceptron that predicts mean and variance, for the diabetes data.",
    dataset="diabetes",
    input_shape=(10,),
    paper=_PAPER,
    task="regression",
    recipe={"epochs": 100, "batch_size": 32, "learning_rate": 1e-3},
)
def mlp_regressor(name="mlp_regressor", **overrides):
    """Builds a perceptron for the diabetes data set.

    Args:
        name: Name of the model.
        **overrides: Arguments of `mlp`.
    """
    return mlp(**{**_DIABETES, **overrides}, name=name)


@register_model(
    "mlp_regressor_flipout",
    description="`mlp_regressor` with distributions over its weights.",
    dataset="diabetes",
    input_shape=(10,),
    paper="https://arxiv.org/abs/1803.04386",
    task="regression",
    recipe={"epochs": 200, "batch_size": 32, "learning_rate": 3e-3},
)
def mlp_regressor_flipout(
    num_examples=309,
    stddev=0.05,
    prior_stddev=1.0,
    name="mlp_regressor_flipout",
    **overrides,
):
    """Builds `mlp_regressor` with Flipout layers.

    Args:
        num_examples: N, the number of training examples.
        stddev: Standard deviation of the weights where they start.
        prior_stddev: Standard deviation of their prior.
        name: Name of the model.
        **overrides: Arguments of `mlp`.
    """
    dense = partial(
        DenseFlipout,
        kernel_posterior_fn=normal_around("he_normal", stddev),
        kernel_prior_fn=NormalPrior(scale=prior_stddev),
        num_examples=num_examples,
    )
    return mlp(**{**_DIABETES, "dense": dense, **overrides}, name=name)


# Of the training split, as raw inputs have them.
_BREAST_CANCER = {
    "features": 30,
    "classes": 2,
    "input_mean": [
        14.1,
        19.22,
        91.81,
        654.7,
        0.09604,
        0.1041,
        0.08867,
        0.04903,
        0.1801,
        0.06274,
        0.4013,
        1.211,
        2.851,
        40.31,
        0.007101,
        0.02546,
        0.03172,
        0.01186,
        0.02063,
        0.003741,
        16.22,
        25.57,
        107.0,
        876.8,
        0.132,
        0.2545,
        0.2709,
        0.1146,
        0.2893,
        0.08389,
    ],
    "input_variance": [
        13.09,
        18.2,
        622.2,
        132100.0,
        0.000194,
        0.00283,
        0.006126,
        0.001548,
        0.0007275,
        5.009e-05,
        0.08262,
        0.2947,
        4.498,
        2351.0,
        9.955e-06,
        0.0002997,
        0.0007191,
        3.771e-05,
        7.045e-05,
        5.359e-06,
        23.96,
        36.57,
        1159.0,
        332800.0,
        0.0005176,
        0.02467,
        0.04196,
        0.004412,
        0.003709,
        0.0003176,
    ],
}


@register_model(
    "mlp_classifier",
    description="Perceptron that tells malignant breast masses from benign ones.",
    dataset="breast_cancer",
    input_shape=(30,),
    paper="https://doi.org/10.1038/323533a0",
    recipe={"epochs": 100, "batch_size": 32, "learning_rate": 1e-3},
)
def mlp_classifier_breast_cancer(name="mlp_classifier", **overrides):
    """Builds a perceptron for the breast cancer data set.

    Args:
        name: Name of the model.
        **overrides: Arguments of `mlp_classifier`.
    """
    return mlp_classifier(**{**_BREAST_CANCER, **overrides}, name=name)
