"""Residual networks for small images."""

import keras

from ...layers import AverageMembers, NormalPrior, TileMembers, to_bayesian
from ...layers.ops.arguments import integer
from ..registry import register_model
from .batch_ensemble import batch_ensemble, check_members
from .pixels import CIFAR10


def resnet(
    input_shape,
    classes,
    depth,
    *,
    width=16,
    scale=1 / 255,
    offset=0.0,
    conv=keras.layers.Conv2D,
    dense=keras.layers.Dense,
    normalization=keras.layers.BatchNormalization,
    ensemble_size=1,
    l2=0.0,
    name="resnet",
):
    """Builds the residual network for small images of He et al.

    A 3×3 convolution, three stages of n basic blocks of width w, 2w and 4w, the
    second and third at half the resolution of the one before, the mean over what
    remains of the image, and a dense layer: 6n + 2 layers with weights. A basic
    block of input x is

        y = relu(x' + BN(conv(relu(BN(conv(x))))),

    with 3×3 convolutions and x' = x or, where the shape changes, BN(conv(x)) with a
    1×1 convolution. BN is batch normalization.

    The method that the weights follow comes in with the layer factories `conv`,
    `dense` and `normalization`; with `ensemble_size` members, whose batches are
    member-major, the model tiles its input and averages its output itself.

    Reference: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition",
    2015, section 4.2. https://arxiv.org/abs/1512.03385

    Args:
        input_shape: Shape of an image, `(height, width, channels)`.
        classes: Number of classes.
        depth: Number of layers with weights, 6n + 2.
        width: Channels of the first stage: 64 for the four times as wide network of
            the BatchEnsemble paper.
        scale: What raw pixels are multiplied by: a number, or one each channel.
        offset: What is then added to them, likewise.
        conv: Makes the convolutions: takes `keras.layers.Conv2D`'s arguments.
        dense: Makes the last layer: takes `keras.layers.Dense`'s arguments.
        normalization: Makes the normalizations: takes
            `keras.layers.BatchNormalization`'s arguments.
        ensemble_size: M, the members that the layers made by the factories have.
        l2: Coefficient of the ℓ2 penalty on the factories' kernels.
        name: Name of the model.

    Returns:
        A `keras.Model` from raw pixels `image` to logits. Of an ensemble, the
        logits of the mean of the members' probabilities; in training, the members'
        log-probabilities, for a member-major batch.

    Raises:
        ValueError: If `depth` is not 6n + 2, or `width` or `ensemble_size` no
            integer of at least 1, or the factories' layers have other members.

    Example:

    >>> from kzoo.zoo.models.resnet import resnet
    >>> resnet((32, 32, 3), classes=10, depth=20).count_params()
    274042
    """
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise ValueError(
            "`depth` must be 6n + 2 for an integer n of at least 1: 8, 14, 20, ... "
            f"Received: depth={depth}"
        )
    layers = keras.layers
    width = integer("width", width)
    ensemble_size = integer("ensemble_size", ensemble_size)
    penalty = keras.regularizers.L2(l2) if l2 else None

    def conv_bn(x, filters, kernel_size, strides, name):
        x = conv(
            filters,
            kernel_size,
            strides=strides,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            kernel_regularizer=penalty,
            name=f"{name}_conv",
        )(x)
        return normalization(name=f"{name}_bn")(x)

    def basic_block(x, filters, strides, name):
        y = conv_bn(x, filters, 3, strides, f"{name}_1")
        y = layers.ReLU(name=f"{name}_1_relu")(y)
        y = conv_bn(y, filters, 3, 1, f"{name}_2")
        if strides != 1 or x.shape[-1] != filters:
            x = conv_bn(x, filters, 1, strides, f"{name}_shortcut")
        return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([x, y]))

    image = keras.Input(input_shape, name="image")
    x = layers.Rescaling(scale, offset, name="scale")(image)
    if ensemble_size > 1:
        x = TileMembers(ensemble_size, name="tile_members")(x)
    x = layers.ReLU(name="stem_relu")(conv_bn(x, width, 3, 1, "stem"))
    for stage in range(3):
        for block in range(blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            x = basic_block(x, width * 2**stage, strides, f"stage{stage}_block{block}")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    # Logits as exact as the weights, also under mixed precision.
    dtype = keras.config.dtype_policy().variable_dtype
    x = dense(classes, kernel_regularizer=penalty, dtype=dtype, name="logits")(x)
    if ensemble_size > 1:
        x = AverageMembers(ensemble_size, name="average_members")(x)
    model = keras.Model(image, x, name=name)
    check_members(model, ensemble_size)
    return model


_DIGITS = {
    "input_shape": (8, 8, 1),
    "classes": 10,
    "depth": 8,
    "scale": 1 / 16,
    "l2": 1e-4,
}
# The best of benchmarks/digits_search.py for each. The single network was tried with
# the ensemble's epochs and rate too, and the ensemble with its.
_DIGITS_RECIPE = {"batch_size": 64, "max_shift": 1}


@register_model(
    "resnet8_digits",
    description="Residual network for 8x8 handwritten digits.",
    dataset="digits",
    input_shape=(8, 8, 1),
    paper="https://arxiv.org/abs/1512.03385",
    recipe={**_DIGITS_RECIPE, "epochs": 160, "learning_rate": 1e-2},
)
def resnet8_digits(name="resnet8_digits", **overrides):
    """Builds a residual network of 8 layers for the digits data set.

    Args:
        name: Name of the model.
        **overrides: Arguments of `resnet`.
    """
    return resnet(**{**_DIGITS, **overrides}, name=name)


@register_model(
    "resnet8_batch_ensemble_digits",
    description="BatchEnsemble of residual networks for 8x8 handwritten digits.",
    dataset="digits",
    input_shape=(8, 8, 1),
    paper="https://arxiv.org/abs/2002.06715",
    recipe={
        **_DIGITS_RECIPE,
        "epochs": 320,
        "learning_rate": 3e-3,
        "members": "split",
    },
)
def resnet8_batch_ensemble_digits(
    ensemble_size=4,
    fast_weights=-0.5,
    name="resnet8_batch_ensemble_digits",
    **overrides,
):
    """Builds `resnet8_digits` with BatchEnsemble layers.

    Args:
        ensemble_size: M, the number of members.
        fast_weights: How the members' fast weights start, as
            `kzoo.layers.batch_ensemble_initializer` takes it: the probability of +1
            of random signs, or minus the standard deviation of a normal around 1.
        name: Name of the model.
        **overrides: Arguments of `resnet`.
    """
    method = batch_ensemble(ensemble_size, fast_weights)
    return resnet(**{**_DIGITS, **method, **overrides}, name=name)


@register_model(
    "resnet8_flipout_digits",
    description="Residual network with distributions over its weights, for the digits.",
    dataset="digits",
    input_shape=(8, 8, 1),
    paper="https://arxiv.org/abs/1803.04386",
    recipe={**_DIGITS_RECIPE, "epochs": 160, "learning_rate": 1e-2},
)
def resnet8_flipout_digits(
    num_examples=1258,
    stddev=0.05,
    prior_stddev=1.0,
    name="resnet8_flipout_digits",
    **overrides,
):
    """Builds `resnet8_digits` with Flipout layers.

    The divergence takes the place of the ℓ2 penalty; batch normalization stays as it
    is.

    Args:
        num_examples: N, the number of training examples.
        stddev: Standard deviation of the weights where they start.
        prior_stddev: Standard deviation of their prior.
        name: Name of the model.
        **overrides: Arguments of `resnet`.
    """
    return to_bayesian(
        resnet(**{**_DIGITS, "l2": 0.0, **overrides}, name=name),
        stddev=stddev,
        kernel_prior_fn=NormalPrior(scale=prior_stddev),
        num_examples=num_examples,
    )


_CIFAR10 = {"input_shape": (32, 32, 3), "classes": 10, "l2": 1e-4, **CIFAR10}


@register_model(
    "resnet20_cifar10",
    description="Residual network of 20 layers for CIFAR-10.",
    dataset="cifar10",
    input_shape=(32, 32, 3),
    paper="https://arxiv.org/abs/1512.03385",
    recipe={"recipe": "cifar"},
)
def resnet20_cifar10(name="resnet20_cifar10", **overrides):
    """Builds ResNet-20 for CIFAR-10.

    Args:
        name: Name of the model.
        **overrides: Arguments of `resnet`.
    """
    return resnet(**{**_CIFAR10, "depth": 20, **overrides}, name=name)


@register_model(
    "resnet32_cifar10",
    description="Residual network of 32 layers for CIFAR-10.",
    dataset="cifar10",
    input_shape=(32, 32, 3),
    paper="https://arxiv.org/abs/1512.03385",
    recipe={"recipe": "cifar"},
)
def resnet32_cifar10(name="resnet32_cifar10", **overrides):
    """Builds ResNet-32 for CIFAR-10.

    Args:
        name: Name of the model.
        **overrides: Arguments of `resnet`.
    """
    return resnet(**{**_CIFAR10, "depth": 32, **overrides}, name=name)


@register_model(
    "resnet20_batch_ensemble_cifar10",
    description="BatchEnsemble of residual networks of 20 layers for CIFAR-10.",
    dataset="cifar10",
    input_shape=(32, 32, 3),
    paper="https://arxiv.org/abs/2002.06715",
    recipe={"recipe": "cifar_batch_ensemble"},
)
def resnet20_batch_ensemble_cifar10(
    ensemble_size=4,
    fast_weights=-0.5,
    name="resnet20_batch_ensemble_cifar10",
    **overrides,
):
    """Builds `resnet20_cifar10` with BatchEnsemble layers.

    Args:
        ensemble_size: M, the number of members.
        fast_weights: How the members' fast weights start, as
            `kzoo.layers.batch_ensemble_initializer` takes it.
        name: Name of the model.
        **overrides: Arguments of `resnet`.
    """
    method = batch_ensemble(ensemble_size, fast_weights)
    return resnet20_cifar10(**{**method, **overrides}, name=name)


@register_model(
    "resnet32_batch_ensemble_cifar10",
    description="BatchEnsemble of residual networks of 32 layers for CIFAR-10.",
    dataset="cifar10",
    input_shape=(32, 32, 3),
    paper="https://arxiv.org/abs/2002.06715",
    recipe={"recipe": "cifar_batch_ensemble"},
)
def resnet32_batch_ensemble_cifar10(
    ensemble_size=4,
    fast_weights=-0.5,
    name="resnet32_batch_ensemble_cifar10",
    **overrides,
):
    """Builds `resnet32_cifar10` with BatchEnsemble layers.

    Args:
        ensemble_size: M, the number of members.
        fast_weights: How the members' fast weights start, as
            `kzoo.layers.batch_ensemble_initializer` takes it.
        name: Name of the model.
        **overrides: Arguments of `resnet`.
    """
    method = batch_ensemble(ensemble_size, fast_weights)
    return resnet32_cifar10(**{**method, **overrides}, name=name)
