"""Residual networks of bottleneck blocks, for large images."""

import keras

from ...layers import AverageMembers, TileMembers
from ...layers.ops.arguments import integer
from ..registry import register_model
from .batch_ensemble import check_members
from .pixels import IMAGENET


def bottleneck_resnet(
    input_shape,
    classes,
    blocks=(3, 4, 6, 3),
    *,
    width=64,
    scale=1 / 255,
    offset=0.0,
    conv=keras.layers.Conv2D,
    dense=keras.layers.Dense,
    normalization=keras.layers.BatchNormalization,
    ensemble_size=1,
    l2=0.0,
    name="bottleneck_resnet",
):
    """Builds the residual network for large images of He et al.

    A 7×7 convolution of w channels at half the resolution and 3×3 max pooling, which
    halves it again; stages of bottleneck blocks, 4w, 8w, 16w, ... channels wide, each
    but the first at half the resolution of the one before; the mean over what remains
    of the image, and a dense layer. A block of input x is

        y = relu(x' + BN(conv1(relu(BN(conv3(relu(BN(conv1(x)))))))),

    with 1×1 convolutions conv1, the first of which has a fourth of the block's
    channels, a 3×3 convolution conv3 of as many, and x' = x or, where the shape
    changes, BN(conv1(x)). BN is batch normalization, with Torch's defaults: ε = 1e-5
    and averages that keep 0.9 of themselves. Convolutions have no bias.

    A stage's first block halves the resolution in its 3×3 convolution, as is common
    today; the paper's does in its first 1×1 one, which sees a pixel of four.

    The method that the weights follow comes in with the layer factories `conv`,
    `dense` and `normalization`; with `ensemble_size` members, whose batches are
    member-major, the model tiles its input and averages its output itself.

    Reference: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition",
    2015, section 4.1. https://arxiv.org/abs/1512.03385

    Args:
        input_shape: Shape of an image, `(height, width, channels)`.
        classes: Number of classes.
        blocks: Number of blocks in each stage. The default is ResNet-50's; ResNet-101
            has (3, 4, 23, 3).
        width: w, channels of the first convolution.
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
        ValueError: If a number of `blocks`, `width` or `ensemble_size` is no integer of
            at least 1, or the factories' layers have other members.

    Example:

    >>> from kzoo.zoo.models.bottleneck_resnet import bottleneck_resnet
    >>> model = bottleneck_resnet((32, 32, 3), classes=10, blocks=(1, 1), width=8)
    >>> model.get_layer("stage1_block0_relu").output.shape
    (None, 4, 4, 64)
    """
    layers = keras.layers
    blocks = [integer("blocks", number) for number in blocks]
    width = integer("width", width)
    ensemble_size = integer("ensemble_size", ensemble_size)
    penalty = keras.regularizers.L2(l2) if l2 else None

    def conv_bn(x, filters, kernel_size, strides, name, padding="same"):
        x = conv(
            filters,
            kernel_size,
            strides=strides,
            padding=padding,
            use_bias=False,
            kernel_initializer="he_normal",
            kernel_regularizer=penalty,
            name=f"{name}_conv",
        )(x)
        return normalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(x)

    def block(x, filters, strides, name):
        y = conv_bn(x, filters, 1, 1, f"{name}_1")
        y = layers.ReLU(name=f"{name}_1_relu")(y)
        y = conv_bn(y, filters, 3, strides, f"{name}_2")
        y = layers.ReLU(name=f"{name}_2_relu")(y)
        y = conv_bn(y, 4 * filters, 1, 1, f"{name}_3")
        if strides != 1 or x.shape[-1] != 4 * filters:
            x = conv_bn(x, 4 * filters, 1, strides, f"{name}_shortcut")
        return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([x, y]))

    image = keras.Input(input_shape, name="image")
    x = layers.Rescaling(scale, offset, name="scale")(image)
    if ensemble_size > 1:
        x = TileMembers(ensemble_size, name="tile_members")(x)
    # Zeros on all sides, where "same" has fewer in front than behind.
    x = layers.ZeroPadding2D(3, name="stem_pad")(x)
    x = layers.ReLU(name="stem_relu")(conv_bn(x, width, 7, 2, "stem", "valid"))
    x = layers.ZeroPadding2D(1, name="stem_pool_pad")(x)
    x = layers.MaxPooling2D(3, 2, name="stem_pool")(x)
    for stage, number in enumerate(blocks):
        for i in range(number):
            strides = 2 if stage > 0 and i == 0 else 1
            x = block(x, width * 2**stage, strides, f"stage{stage}_block{i}")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    # Logits as exact as the weights, also under mixed precision.
    dtype = keras.config.dtype_policy().variable_dtype
    x = dense(classes, kernel_regularizer=penalty, dtype=dtype, name="logits")(x)
    if ensemble_size > 1:
        x = AverageMembers(ensemble_size, name="average_members")(x)
    model = keras.Model(image, x, name=name)
    check_members(model, ensemble_size)
    return model


@register_model(
    "resnet50_imagenet2012",
    description="Residual network of 50 layers for ImageNet.",
    dataset="imagenet2012",
    input_shape=(224, 224, 3),
    paper="https://arxiv.org/abs/1512.03385",
)
def resnet50_imagenet2012(name="resnet50_imagenet2012", **overrides):
    """Builds ResNet-50 for ImageNet.

    Args:
        name: Name of the model.
        **overrides: Arguments of `bottleneck_resnet`.
    """
    defaults = {
        "input_shape": (224, 224, 3),
        "classes": 1000,
        "l2": 1e-4,
        **IMAGENET,
    }
    return bottleneck_resnet(**{**defaults, **overrides}, name=name)
