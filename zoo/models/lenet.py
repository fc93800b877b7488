"""LeNet-5 for small images."""

from functools import partial

import keras

from ...layers import Conv2DFlipout, DenseFlipout, NormalPrior
from ..registry import register_model
from .posterior import normal_around


def lenet5(
    input_shape,
    classes,
    *,
    scale=1 / 255,
    padding="valid",
    activation="relu",
    conv=keras.layers.Conv2D,
    dense=keras.layers.Dense,
    name="lenet5",
):
    """Builds LeNet-5 of LeCun et al. as it is commonly used today.

    Two 5×5 convolutions of 6 and 16 channels, each followed by 2×2 max pooling, and
    dense layers of 120, 84 and as many units as there are classes. The activation is
    ReLU. (The paper has tanh, means with trained factors in place of the maxima, a
    partly connected second convolution, and radial basis functions at the end.)

    With `padding="valid"`, as in the paper, an image must have at least 16 pixels each
    way, and 32×32 gives the paper's sizes. `"same"` keeps the size in the
    convolutions, for images from 4×4.

    The method that the weights follow comes in with the layer factories `conv` and
    `dense`.

    Reference: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to
    Document Recognition", 1998. https://doi.org/10.1109/5.726791

    Args:
        input_shape: Shape of an image, `(height, width, channels)`.
        classes: Number of classes.
        scale: What raw pixels are multiplied by.
        padding: Of the convolutions, `"valid"` or `"same"`.
        activation: Of all layers but the last.
        conv: Makes the convolutions: takes `keras.layers.Conv2D`'s arguments.
        dense: Makes the dense layers: takes `keras.layers.Dense`'s arguments.
        name: Name of the model.

    Returns:
        A `keras.Model` from raw pixels `image` to logits.

    Raises:
        ValueError: If `padding` is none of the two, or an image is too small for it.

    Example:

    >>> from kzoo.zoo.models.lenet import lenet5
    >>> lenet5((32, 32, 1), classes=10).count_params()
    61706
    """
    least = {"valid": 16, "same": 4}
    if padding not in least:
        raise ValueError(
            f"expected `padding` to be one of {list(least)}. "
            f"Received: padding={padding!r}"
        )
    if min(input_shape[:2]) < least[padding]:
        raise ValueError(
            f"expected images of at least {least[padding]} pixels each way with "
            f"padding={padding!r}, of 16 with 'valid' and 4 with 'same'. "
            f"Received: input_shape={tuple(input_shape)}"
        )
    layers = keras.layers
    image = keras.Input(input_shape, name="image")
    x = layers.Rescaling(scale, name="scale")(image)
    for i, channels in enumerate((6, 16)):
        x = conv(channels, 5, padding=padding, activation=activation, name=f"conv{i}")(
            x
        )
        x = layers.MaxPooling2D(2, name=f"pool{i}")(x)
    x = layers.Flatten(name="flatten")(x)
    for i, units in enumerate((120, 84)):
        x = dense(units, activation=activation, name=f"dense{i}")(x)
    # Logits as exact as the weights, also under mixed precision.
    dtype = keras.config.dtype_policy().variable_dtype
    return keras.Model(image, dense(classes, dtype=dtype, name="logits")(x), name=name)


_DIGITS = {
    "input_shape": (8, 8, 1),
    "classes": 10,
    "scale": 1 / 16,
    "padding": "same",
}


@register_model(
    "lenet5_digits",
    description="LeNet-5 for 8x8 handwritten digits.",
    dataset="digits",
    input_shape=(8, 8, 1),
    paper="https://doi.org/10.1109/5.726791",
    recipe={"epochs": 100, "learning_rate": 5e-3},
)
def lenet5_digits(name="lenet5_digits", **overrides):
    """Builds LeNet-5 for the digits data set, whose images it pads.

    Args:
        name: Name of the model.
        **overrides: Arguments of `lenet5`.
    """
    return lenet5(**{**_DIGITS, **overrides}, name=name)


@register_model(
    "lenet5_flipout_digits",
    description="LeNet-5 with distributions over its weights, for the digits.",
    dataset="digits",
    input_shape=(8, 8, 1),
    paper="https://arxiv.org/abs/1803.04386",
    recipe={"epochs": 200, "learning_rate": 1e-2},
)
def lenet5_flipout_digits(
    num_examples=1258,
    stddev=0.05,
    prior_stddev=0.3,
    name="lenet5_flipout_digits",
    **overrides,
):
    """Builds `lenet5_digits` with Flipout layers.

    Args:
        num_examples: N, the number of training examples.
        stddev: Standard deviation of the weights where they start.
        prior_stddev: Standard deviation of their prior.
        name: Name of the model.
        **overrides: Arguments of `lenet5`.
    """
    method = {
        "kernel_posterior_fn": normal_around("he_normal", stddev),
        "kernel_prior_fn": NormalPrior(scale=prior_stddev),
        "num_examples": num_examples,
    }
    factories = {
        "conv": partial(Conv2DFlipout, **method),
        "dense": partial(DenseFlipout, **method),
    }
    return lenet5(**{**_DIGITS, **factories, **overrides}, name=name)
