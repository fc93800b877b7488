"""Depthwise convolutions with a distribution over their weights."""

import keras
from keras import ops

from .conv import Convolution
from .estimators import Flipout, LocalReparameterization, Reparameterization

OF_PLAIN = (
    "kernel_size",
    "strides",
    "padding",
    "depth_multiplier",
    "data_format",
    "dilation_rate",
)


class DepthwiseConvVariational(Convolution):
    """y = φ(x ⊛ W + b), with W and b drawn from posteriors."""

    of_plain = OF_PLAIN

    def __init__(
        self,
        kernel_size,
        strides=1,
        padding="valid",
        depth_multiplier=1,
        data_format=None,
        dilation_rate=1,
        activation=None,
        **kwargs,
    ):
        super().__init__(activation=activation, **kwargs)
        self._keep(
            kernel_size,
            strides,
            padding,
            depth_multiplier,
            data_format,
            dilation_rate,
        )

    def _kernel_shape(self, channels):
        return (*self.kernel_size, channels, self.depth_multiplier)

    def _sign_shapes(self, input_shape):
        # Each entry of the kernel is met by one output channel alone, so r turns all
        # signs: s ∘ r would be distributed as r is.
        return None, super()._sign_shapes(input_shape)[1]

    def linear(self, x, kernel):
        """x ⊛ W."""
        return ops.depthwise_conv(
            x,
            kernel,
            strides=self.strides,
            padding=self.padding,
            data_format=self.data_format,
            dilation_rate=self.dilation_rate,
        )


@keras.saving.register_keras_serializable(package="kzoo")
class DepthwiseConv2DFlipout(DepthwiseConvVariational):
    """A depthwise 2D convolution with a distribution over its weights, by Flipout.

    The kernel W is drawn from a posterior q with mean W̄. One perturbation ΔW̃ = W - W̄
    is drawn for the whole batch, and each row n turns its signs by a random vector r_n
    of -1 and +1, one number an output channel, the same at all positions:

        y_n = φ(x_n ⊛ W̄ + (x_n ⊛ ΔW̃) ∘ r_n + b),

    with ⊛ the convolution of each channel c by kernels of its own, m = 1 to M, into
    the output channels c M + m. An entry W[i, j, c, m] meets the output channel c M + m
    alone, so that r_n turns the signs of all entries. Signs s_n of the input channels,
    as the other layers have, would change nothing: the product of s_n[c] and
    r_n[c M + m] is distributed as r_n[c M + m] is, independently for all channels.

    All else is as `kzoo.layers.DenseFlipout` says. Takes
    `keras.layers.DepthwiseConv2D`'s first arguments; all after `activation` go by name.
    What Keras names `depthwise_...` is `kernel_...` here.

    Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent
    Weight Perturbations on Mini-Batches", 2018. https://arxiv.org/abs/1803.04386

    Args:
        kernel_size: Integer or tuple of 2, the kernel's size.
        strides: Integer or tuple of 2. TensorFlow wants equal ones.
        padding: `"valid"` or `"same"`.
        depth_multiplier: M, the number of output channels for each input channel.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to Keras's
            setting.
        dilation_rate: Integer or tuple of 2.
        activation: φ. Defaults to none.
        activity_regularizer: Of the output.
        kernel_posterior_fn: As `kzoo.layers.DenseFlipout`'s, and so the following.
        kernel_prior_fn: Makes the kernel's prior.
        kernel_divergence_fn: Its divergence.
        bias_posterior_fn: Makes the bias's posterior. None: no bias.
        bias_prior_fn: Makes the bias's prior. Defaults to none.
        bias_divergence_fn: Its divergence.
        num_examples: N, what the divergences are divided by.
        seed: An integer, for the same draws again.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        `[B, height, width, channels]`, or with
        `data_format="channels_first"` `[B, channels, height, width]`.

    Output shape:
        `[B, new_height, new_width, channels * depth_multiplier]`, or likewise.

    Raises:
        ValueError: If an argument is out of range; when built, as `DenseFlipout`.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import DepthwiseConv2DFlipout
    >>> layer = DepthwiseConv2DFlipout(3, depth_multiplier=2, num_examples=1000)
    >>> layer(np.ones((2, 8, 8, 3), "float32")).shape == (2, 6, 6, 6)
    True
    """

    estimator = Flipout
    plain = keras.layers.DepthwiseConv2D


@keras.saving.register_keras_serializable(package="kzoo")
class DepthwiseConv2DReparameterization(DepthwiseConvVariational):
    """A depthwise 2D convolution with a distribution over its weights, drawn once.

    All rows of a call share one draw of the kernel, W ~ q: y = φ(x ⊛ W + b). See
    `DepthwiseConv2DFlipout`, which differs in the estimator alone.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        **kwargs: `DepthwiseConv2DFlipout`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        `[B, height, width, channels]`, or with
        `data_format="channels_first"` `[B, channels, height, width]`.

    Output shape:
        `[B, new_height, new_width, channels * depth_multiplier]`, or likewise.

    Raises:
        ValueError: As `DepthwiseConv2DFlipout`, but any posterior is taken.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import DepthwiseConv2DReparameterization
    >>> layer = DepthwiseConv2DReparameterization(3, num_examples=1000)
    >>> layer(np.ones((2, 8, 8, 3), "float32")).shape == (2, 6, 6, 3)
    True
    """

    estimator = Reparameterization
    plain = keras.layers.DepthwiseConv2D


@keras.saving.register_keras_serializable(package="kzoo")
class DepthwiseConv2DLocalReparameterization(DepthwiseConvVariational):
    """A depthwise 2D convolution with a distribution over its weights; outputs drawn.

    Each output has the distribution it has under a normal posterior N(W̄, σ²), and is
    drawn for itself, with ε ~ N(0, 1): y = φ(x ⊛ W̄ + ε ∘ sqrt(x² ⊛ σ²) + b). Outputs
    at different positions share the kernel and so would covary; here they do not. See
    `DepthwiseConv2DFlipout`, which differs in the estimator alone.

    Reference: Kingma, Salimans, Welling, "Variational Dropout and the Local
    Reparameterization Trick", 2015. https://arxiv.org/abs/1506.02557

    Args:
        **kwargs: `DepthwiseConv2DFlipout`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        `[B, height, width, channels]`, or with
        `data_format="channels_first"` `[B, channels, height, width]`.

    Output shape:
        `[B, new_height, new_width, channels * depth_multiplier]`, or likewise.

    Raises:
        ValueError: As `DepthwiseConv2DFlipout`; when built, if the posterior is not
            normal.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import DepthwiseConv2DLocalReparameterization
    >>> layer = DepthwiseConv2DLocalReparameterization(3, num_examples=1000)
    >>> layer(np.ones((2, 8, 8, 3), "float32")).shape == (2, 6, 6, 3)
    True
    """

    estimator = LocalReparameterization
    plain = keras.layers.DepthwiseConv2D
