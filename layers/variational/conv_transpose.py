"""Transposed convolutions with a distribution over their weights."""

import keras
from keras import ops

from .conv import Convolution
from .estimators import Flipout, LocalReparameterization, Reparameterization

OF_PLAIN = (
    "filters",
    "kernel_size",
    "strides",
    "padding",
    "output_padding",
    "data_format",
    "dilation_rate",
)


class ConvTransposeVariational(Convolution):
    """y = φ(x *ᵀ W + b), with W and b drawn from posteriors."""

    of_plain = OF_PLAIN

    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        padding="valid",
        output_padding=None,
        data_format=None,
        dilation_rate=1,
        activation=None,
        **kwargs,
    ):
        super().__init__(activation=activation, **kwargs)
        self._keep(
            filters,
            kernel_size,
            strides,
            padding,
            output_padding,
            data_format,
            dilation_rate,
        )

    def _kernel_shape(self, channels):
        return (*self.kernel_size, self.filters, channels)

    def linear(self, x, kernel):
        """x *ᵀ W."""
        return ops.conv_transpose(
            x,
            kernel,
            strides=list(self.strides),
            padding=self.padding,
            output_padding=self.output_padding,
            data_format=self.data_format,
            dilation_rate=self.dilation_rate,
        )


@keras.saving.register_keras_serializable(package="kzoo")
class Conv2DTransposeFlipout(ConvTransposeVariational):
    """A transposed 2D convolution with a distribution over its weights, by Flipout.

    The kernel W is drawn from a posterior q with mean W̄. One perturbation ΔW̃ = W - W̄
    is drawn for the whole batch, and each row n turns its signs by random vectors s_n
    and r_n of -1 and +1, one number a channel, the same at all positions:

        y_n = φ(x_n *ᵀ W̄ + ((x_n ∘ s_n) *ᵀ ΔW̃) ∘ r_n + b),

    with *ᵀ the transposed convolution. Row n's kernel is thus W̄ + ΔW̃ ∘ (r_n s_nᵀ) at
    each of its places, as its axes are [height, width, filters, channels].

    All else is as `kzoo.layers.DenseFlipout` says. Takes
    `keras.layers.Conv2DTranspose`'s first arguments; all after `activation` go by name.

    Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent
    Weight Perturbations on Mini-Batches", 2018. https://arxiv.org/abs/1803.04386

    Args:
        filters: Number of output channels.
        kernel_size: Integer or tuple of 2, the kernel's size.
        strides: Integer or tuple of 2.
        padding: `"valid"` or `"same"`.
        output_padding: Integer or tuple of 2, less than the strides: what is added to
            one side of the output. None: as the other arguments ask for.
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
        `[B, new_height, new_width, filters]`, or likewise.

    Raises:
        ValueError: If an argument is out of range; when built, as `DenseFlipout`.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv2DTransposeFlipout
    >>> layer = Conv2DTransposeFlipout(4, 3, strides=2, num_examples=1000)
    >>> layer(np.ones((2, 8, 8, 3), "float32")).shape == (2, 17, 17, 4)
    True
    """

    estimator = Flipout
    plain = keras.layers.Conv2DTranspose


@keras.saving.register_keras_serializable(package="kzoo")
class Conv2DTransposeReparameterization(ConvTransposeVariational):
    """A transposed 2D convolution with a distribution over its weights, drawn once.

    All rows of a call share one draw of the kernel, W ~ q: y = φ(x *ᵀ W + b). See
    `Conv2DTransposeFlipout`, which differs in the estimator alone.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        **kwargs: `Conv2DTransposeFlipout`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        `[B, height, width, channels]`, or with
        `data_format="channels_first"` `[B, channels, height, width]`.

    Output shape:
        `[B, new_height, new_width, filters]`, or likewise.

    Raises:
        ValueError: As `Conv2DTransposeFlipout`, but any posterior is taken.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv2DTransposeReparameterization
    >>> layer = Conv2DTransposeReparameterization(4, 3, num_examples=1000)
    >>> layer(np.ones((2, 8, 8, 3), "float32")).shape == (2, 10, 10, 4)
    True
    """

    estimator = Reparameterization
    plain = keras.layers.Conv2DTranspose


@keras.saving.register_keras_serializable(package="kzoo")
class Conv2DTransposeLocalReparameterization(ConvTransposeVariational):
    """A transposed 2D convolution with a distribution over its weights; outputs drawn.

    Each output has the distribution it has under a normal posterior N(W̄, σ²), and is
    drawn for itself, with ε ~ N(0, 1): y = φ(x *ᵀ W̄ + ε ∘ sqrt(x² *ᵀ σ²) + b). Outputs
    at different positions share the kernel and so would covary; here they do not. See
    `Conv2DTransposeFlipout`, which differs in the estimator alone.

    Reference: Kingma, Salimans, Welling, "Variational Dropout and the Local
    Reparameterization Trick", 2015. https://arxiv.org/abs/1506.02557

    Args:
        **kwargs: `Conv2DTransposeFlipout`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        `[B, height, width, channels]`, or with
        `data_format="channels_first"` `[B, channels, height, width]`.

    Output shape:
        `[B, new_height, new_width, filters]`, or likewise.

    Raises:
        ValueError: As `Conv2DTransposeFlipout`; when built, if the posterior is not
            normal.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv2DTransposeLocalReparameterization
    >>> layer = Conv2DTransposeLocalReparameterization(4, 3, num_examples=1000)
    >>> layer(np.ones((2, 8, 8, 3), "float32")).shape == (2, 10, 10, 4)
    True
    """

    estimator = LocalReparameterization
    plain = keras.layers.Conv2DTranspose
