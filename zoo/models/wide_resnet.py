"""Wide residual networks for small images."""

import keras

from ...layers import AverageMembers, TileMembers
from ...layers.ops.arguments import integer
from ..registry import register_model
from .batch_ensemble import batch_ensemble, check_members
from .pixels import CIFAR10


def wide_resnet(
    input_shape,
    classes,
    depth,
    width,
    *,
    scale=1 / 255,
    offset=0.0,
    conv=keras.layers.Conv2D,
    dense=keras.layers.Dense,
    normalization=keras.layers.BatchNormalization,
    ensemble_size=1,
    l2=0.0,
    name="wide_resnet",
):
    """Builds the wide residual network WRN-d-k of Zagoruyko and Komodakis.

    A 3×3 convolution of 16 channels, three stages of n blocks of 16k, 32k and 64k
    channels, the second and third at half the resolution of the one before, a last
    normalization and ReLU, the mean over what remains of the image, and a dense layer.
    The depth d = 6n + 4 counts the convolutions, with one in a shortcut of each stage.
    A block of input x is

        y = x' + conv(relu(BN(conv(relu(BN(x)))))),

    with 3×3 convolutions and x' = x or, where the shape changes, conv(x) with a 1×1
    convolution. BN is batch normalization, with Torch's defaults: ε = 1e-5 and averages
    that keep 0.9 of themselves. Convolutions have no bias, and kernels start as He et
    al. have them. With `l2` all weights have a penalty but for an ensemble's fast
    weights: kernels, the normalizations' γ and β, and the last layer's bias.

    Where authors' code and uncertainty-baselines differ it is as in the latter: x' is
    conv(x), and not conv(relu(BN(x))), and there is a penalty on all of the above.

    The method that the weights follow comes in with the layer factories `conv`,
    `dense` and `normalization`; with `ensemble_size` members, whose batches are
    member-major, the model tiles its input and averages its output itself.

    Reference: Zagoruyko, Komodakis, "Wide Residual Networks", 2016.
    https://arxiv.org/abs/1605.07146

    Args:
        input_shape: Shape of an image, `(height, width, channels)`.
        classes: Number of classes.
        depth: d, 6n + 4.
        width: k, how many times as wide as the residual network of 16, 32 and 64
            channels.
        scale: What raw pixels are multiplied by: a number, or one each channel.
        offset: What is then added to them, likewise.
        conv: Makes the convolutions: takes `keras.layers.Conv2D`'s arguments.
        dense: Makes the last layer: takes `keras.layers.Dense`'s arguments.
        normalization: Makes the normalizations: takes
            `keras.layers.BatchNormalization`'s arguments.
        ensemble_size: M, the members that the layers made by the factories have.
        l2: Coefficient of the ℓ2 penalty.
        name: Name of the model.

    Returns:
        A `keras.Model` from raw pixels `image` to logits. Of an ensemble, the
        logits of the mean of the members' probabilities; in training, the members'
        log-probabilities, for a member-major batch.

    Raises:
        ValueError: If `depth` is not 6n + 4, or `width` or `ensemble_size` no
            integer of at least 1, or the factories' layers have other members.

    Example:

    >>> from kzoo.zoo.models.wide_resnet import wide_resnet
    >>> wide_resnet((32, 32, 3), classes=10, depth=10, width=1).count_params()
    78330
    """
    blocks, rest = divmod(integer("depth", depth) - 4, 6)
    if blocks < 1 or rest:
        raise ValueError(
            "expected `depth` to be 6n + 4 for an integer n of at least 1: 10, 16, "
            f"22, 28, ... Received: depth={depth}"
        )
    layers = keras.layers
    width = integer("width", width)
    ensemble_size = integer("ensemble_size", ensemble_size)
    penalty = keras.regularizers.L2(l2) if l2 else None

    def convolution(x, filters, kernel_size, strides, name):
        return conv(
            filters,
            kernel_size,
            strides=strides,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            kernel_regularizer=penalty,
            name=name,
        )(x)

    def bn_relu(x, name):
        x = normalization(
            momentum=0.9,
            epsilon=1e-5,
            beta_regularizer=penalty,
            gamma_regularizer=penalty,
            name=f"{name}_bn",
        )(x)
        return layers.ReLU(name=f"{name}_relu")(x)

    def block(x, filters, strides, name):
        y = bn_relu(x, f"{name}_1")
        y = convolution(y, filters, 3, strides, f"{name}_1_conv")
        y = bn_relu(y, f"{name}_2")
        y = convolution(y, filters, 3, 1, f"{name}_2_conv")
        if strides != 1 or x.shape[-1] != filters:
            x = convolution(x, filters, 1, strides, f"{name}_shortcut_conv")
        return layers.Add(name=f"{name}_add")([x, y])

    image = keras.Input(input_shape, name="image")
    x = layers.Rescaling(scale, offset, name="scale")(image)
    if ensemble_size > 1:
        x = TileMembers(ensemble_size, name="tile_members")(x)
    x = convolution(x, 16, 3, 1, "stem_conv")
    for stage in range(3):
        for i in range(blocks):
            strides = 2 if stage > 0 and i == 0 else 1
            x = block(x, 16 * width * 2**stage, strides, f"stage{stage}_block{i}")
    x = bn_relu(x, "last")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = dense(
        classes,
        kernel_initializer="he_normal",
        kernel_regularizer=penalty,
        bias_regularizer=penalty,
        # Logits as exact as the weights, also under mixed precision.
        dtype=keras.config.dtype_policy().variable_dtype,
        name="logits",
    )(x)
    if ensemble_size > 1:
        x = AverageMembers(ensemble_size, name="average_members")(x)
    model = keras.Model(image, x, name=name)
    check_members(model, ensemble_size)
    return model


_CIFAR10 = {
    "input_shape": (32, 32, 3),
    "classes": 10,
    "depth": 28,
    "width": 10,
    "l2": 2e-4,
    **CIFAR10,
}


@register_model(
    "wide_resnet28_10_cifar10",
    description="Wide residual network of depth 28 and width 10 for CIFAR-10.",
    dataset="cifar10",
    input_shape=(32, 32, 3),
    paper="https://arxiv.org/abs/1605.07146",
    recipe={"recipe": "cifar"},
)
def wide_resnet28_10_cifar10(name="wide_resnet28_10_cifar10", **overrides):
    """Builds WRN-28-10 for CIFAR-10, as uncertainty-baselines has it.

    Args:
        name: Name of the model.
        **overrides: Arguments of `wide_resnet`.
    """
    return wide_resnet(**{**_CIFAR10, **overrides}, name=name)


@register_model(
    "wide_resnet28_10_batch_ensemble_cifar10",
    description="BatchEnsemble of wide residual networks for CIFAR-10.",
    dataset="cifar10",
    input_shape=(32, 32, 3),
    paper="https://arxiv.org/abs/2002.06715",
    recipe={"recipe": "cifar_batch_ensemble"},
)
def wide_resnet28_10_batch_ensemble_cifar10(
    ensemble_size=4,
    fast_weights=-0.5,
    name="wide_resnet28_10_batch_ensemble_cifar10",
    **overrides,
):
    """Builds `wide_resnet28_10_cifar10` with BatchEnsemble layers.

    Args:
        ensemble_size: M, the number of members.
        fast_weights: How the members' fast weights start, as
            `kzoo.layers.batch_ensemble_initializer` takes it: the probability of +1
            of random signs, or minus the standard deviation of a normal around 1.
        name: Name of the model.
        **overrides: Arguments of `wide_resnet`.
    """
    method = batch_ensemble(ensemble_size, fast_weights)
    return wide_resnet(**{**_CIFAR10, "l2": 3e-4, **method, **overrides}, name=name)
