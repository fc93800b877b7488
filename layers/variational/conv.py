"""Convolutions with a distribution over their weights."""

import keras
from keras import ops

from .base import VariationalLayer
from .estimators import Flipout, LocalReparameterization, Reparameterization

OF_PLAIN = (
    "filters",
    "kernel_size",
    "strides",
    "padding",
    "data_format",
    "dilation_rate",
    "groups",
)


class Convolution(VariationalLayer):
    """What all kinds of convolutions share.

    A subclass says what `plain` layer it is the counterpart of, which of its arguments
    it takes (`of_plain`), and what the map is (`_kernel_shape`, `linear`).
    """

    groups = 1

    def _keep(self, *values):
        """Keeps the plain layer's arguments, as that checks them."""
        arguments = dict(zip(self.of_plain, values, strict=True))
        # A name of its own is no number of Keras's count of names.
        plain = self.plain(**arguments, name="plain")
        for name in arguments:
            setattr(self, name, getattr(plain, name))
        self.channel_axis = 1 if self.data_format == "channels_first" else -1

    def build(self, input_shape):
        """Makes the parameters of the posteriors and priors."""
        channels = input_shape[self.channel_axis]
        if channels is None or channels % self.groups:
            raise ValueError(
                f"expected a number of channels that `groups={self.groups}` divides. "
                f"Received: inputs of shape {tuple(input_shape)}"
            )
        self.input_spec = keras.layers.InputSpec(
            ndim=len(self.kernel_size) + 2, axes={self.channel_axis: channels}
        )
        self.channels_out = self.compute_output_shape(input_shape)[self.channel_axis]
        super().build(input_shape)

    def _weight_shapes(self, input_shape):
        kernel_shape = self._kernel_shape(input_shape[self.channel_axis])
        return kernel_shape, (self.channels_out,)

    def _at_channels(self, rows, channels):
        positions = [1] * len(self.kernel_size)
        if self.channel_axis == 1:
            return (rows, channels, *positions)
        return (rows, *positions, channels)

    def _sign_shapes(self, input_shape):
        rows, channels = input_shape[0], input_shape[self.channel_axis]
        return (
            self._at_channels(rows, channels),
            self._at_channels(rows, self.channels_out),
        )

    def _bias_at_channels(self, bias):
        return ops.reshape(bias, self._at_channels(1, self.channels_out))

    def compute_output_shape(self, input_shape):
        """Returns the plain layer's output shape."""
        arguments = {name: getattr(self, name) for name in self.of_plain}
        plain = self.plain(**arguments, name="plain")
        return tuple(plain.compute_output_shape(input_shape))

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **{name: getattr(self, name) for name in self.of_plain},
            **super().get_config(),
        }


class ConvVariational(Convolution):
    """y = φ(x * W + b), with W and b drawn from posteriors."""

    of_plain = OF_PLAIN

    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        padding="valid",
        data_format=None,
        dilation_rate=1,
        activation=None,
        *,
        groups=1,
        **kwargs,
    ):
        super().__init__(activation=activation, **kwargs)
        self._keep(
            filters,
            kernel_size,
            strides,
            padding,
            data_format,
            dilation_rate,
            groups,
        )

    def _kernel_shape(self, channels):
        return (*self.kernel_size, channels // self.groups, self.filters)

    def linear(self, x, kernel):
        """x * W."""
        padding = self.padding
        if padding == "causal":
            before = self.dilation_rate[0] * (self.kernel_size[0] - 1)
            pad = [[0, 0], [0, 0], [0, 0]]
            pad[2 if self.channel_axis == 1 else 1] = [before, 0]
            x, padding = ops.pad(x, pad), "valid"
        return ops.conv(
            x,
            kernel,
            strides=list(self.strides),
            padding=padding,
            data_format=self.data_format,
            dilation_rate=self.dilation_rate,
        )


@keras.saving.register_keras_serializable(package="kzoo")
class Conv1DFlipout(ConvVariational):
    """A 1D convolution with a distribution over its weights, estimated by Flipout.

    The kernel W is drawn from a posterior q with mean W̄. One perturbation ΔW̃ = W - W̄
    is drawn for the whole batch, and each row n turns its signs by random vectors s_n
    and r_n of -1 and +1, one number a channel, the same at all positions:

        y_n = φ(x_n * W̄ + ((x_n ∘ s_n) * ΔW̃) ∘ r_n + b).

    All else is as `kzoo.layers.DenseFlipout` says. Takes
    `tfp.layers.Convolution1DFlipout`'s arguments, those after `activation` by name, and
    `groups`.

    Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent
    Weight Perturbations on Mini-Batches", 2018. https://arxiv.org/abs/1803.04386

    Args:
        filters: Number of output channels.
        kernel_size: Integer or tuple of 1, the kernel's size.
        strides: Integer or tuple of 1.
        padding: `"valid"` or `"same"`, or `"causal"`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to Keras's
            setting.
        dilation_rate: Integer or tuple of 1.
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
        groups: Into how many groups the channels are split.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        `[B, length, channels]`, or with
        `data_format="channels_first"` `[B, channels, length]`.

    Output shape:
        `[B, new_length, filters]`, or likewise.

    Raises:
        ValueError: If an argument is out of range; when built, as `DenseFlipout`.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv1DFlipout
    >>> layer = Conv1DFlipout(4, 3, num_examples=1000)
    >>> layer(np.ones((2, 8, 3), "float32")).shape == (2, 6, 4)
    True
    """

    estimator = Flipout
    plain = keras.layers.Conv1D


@keras.saving.register_keras_serializable(package="kzoo")
class Conv1DReparameterization(ConvVariational):
    """A 1D convolution with a distribution over its weights, drawn once a call.

    All rows share one draw of the kernel, W ~ q: y = φ(x * W + b). See
    `Conv1DFlipout`, which differs in the estimator alone.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        **kwargs: `Conv1DFlipout`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        `[B, length, channels]`, or with
        `data_format="channels_first"` `[B, channels, length]`.

    Output shape:
        `[B, new_length, filters]`, or likewise.

    Raises:
        ValueError: As `Conv1DFlipout`, but any posterior is taken.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv1DReparameterization
    >>> layer = Conv1DReparameterization(4, 3, num_examples=1000)
    >>> layer(np.ones((2, 8, 3), "float32")).shape == (2, 6, 4)
    True
    """

    estimator = Reparameterization
    plain = keras.layers.Conv1D


@keras.saving.register_keras_serializable(package="kzoo")
class Conv1DLocalReparameterization(ConvVariational):
    """A 1D convolution with a distribution over its weights; outputs are drawn.

    Each output has the distribution it has under a normal posterior N(W̄, σ²), and is
    drawn for itself, with ε ~ N(0, 1): y = φ(x * W̄ + ε ∘ sqrt(x² * σ²) + b). Outputs
    at different positions share the kernel and so would covary; here they do not. See
    `Conv1DFlipout`, which differs in the estimator alone.

    Reference: Kingma, Salimans, Welling, "Variational Dropout and the Local
    Reparameterization Trick", 2015. https://arxiv.org/abs/1506.02557

    Args:
        **kwargs: `Conv1DFlipout`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        `[B, length, channels]`, or with
        `data_format="channels_first"` `[B, channels, length]`.

    Output shape:
        `[B, new_length, filters]`, or likewise.

    Raises:
        ValueError: As `Conv1DFlipout`; when built, if the posterior is not normal.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv1DLocalReparameterization
    >>> layer = Conv1DLocalReparameterization(4, 3, num_examples=1000)
    >>> layer(np.ones((2, 8, 3), "float32")).shape == (2, 6, 4)
    True
    """

    estimator = LocalReparameterization
    plain = keras.layers.Conv1D


@keras.saving.register_keras_serializable(package="kzoo")
class Conv2DFlipout(ConvVariational):
    """A 2D convolution with a distribution over its weights, estimated by Flipout.

    The kernel W is drawn from a posterior q with mean W̄. One perturbation ΔW̃ = W - W̄
    is drawn for the whole batch, and each row n turns its signs by random vectors s_n
    and r_n of -1 and +1, one number a channel, the same at all positions:

        y_n = φ(x_n * W̄ + ((x_n ∘ s_n) * ΔW̃) ∘ r_n + b).

    All else is as `kzoo.layers.DenseFlipout` says. Takes
    `tfp.layers.Convolution2DFlipout`'s arguments, those after `activation` by name, and
    `groups`.

    Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent
    Weight Perturbations on Mini-Batches", 2018. https://arxiv.org/abs/1803.04386

    Args:
        filters: Number of output channels.
        kernel_size: Integer or tuple of 2, the kernel's size.
        strides: Integer or tuple of 2.
        padding: `"valid"` or `"same"`.
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
        groups: Into how many groups the channels are split.
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
    >>> from kzoo.layers import Conv2DFlipout
    >>> layer = Conv2DFlipout(4, 3, num_examples=1000)
    >>> layer(np.ones((2, 8, 8, 3), "float32")).shape == (2, 6, 6, 4)
    True
    """

    estimator = Flipout
    plain = keras.layers.Conv2D


@keras.saving.register_keras_serializable(package="kzoo")
class Conv2DReparameterization(ConvVariational):
    """A 2D convolution with a distribution over its weights, drawn once a call.

    All rows share one draw of the kernel, W ~ q: y = φ(x * W + b). See
    `Conv2DFlipout`, which differs in the estimator alone.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        **kwargs: `Conv2DFlipout`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        `[B, height, width, channels]`, or with
        `data_format="channels_first"` `[B, channels, height, width]`.

    Output shape:
        `[B, new_height, new_width, filters]`, or likewise.

    Raises:
        ValueError: As `Conv2DFlipout`, but any posterior is taken.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv2DReparameterization
    >>> layer = Conv2DReparameterization(4, 3, num_examples=1000)
    >>> layer(np.ones((2, 8, 8, 3), "float32")).shape == (2, 6, 6, 4)
    True
    """

    estimator = Reparameterization
    plain = keras.layers.Conv2D


@keras.saving.register_keras_serializable(package="kzoo")
class Conv2DLocalReparameterization(ConvVariational):
    """A 2D convolution with a distribution over its weights; outputs are drawn.

    Each output has the distribution it has under a normal posterior N(W̄, σ²), and is
    drawn for itself, with ε ~ N(0, 1): y = φ(x * W̄ + ε ∘ sqrt(x² * σ²) + b). Outputs
    at different positions share the kernel and so would covary; here they do not. See
    `Conv2DFlipout`, which differs in the estimator alone.

    Reference: Kingma, Salimans, Welling, "Variational Dropout and the Local
    Reparameterization Trick", 2015. https://arxiv.org/abs/1506.02557

    Args:
        **kwargs: `Conv2DFlipout`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        `[B, height, width, channels]`, or with
        `data_format="channels_first"` `[B, channels, height, width]`.

    Output shape:
        `[B, new_height, new_width, filters]`, or likewise.

    Raises:
        ValueError: As `Conv2DFlipout`; when built, if the posterior is not normal.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv2DLocalReparameterization
    >>> layer = Conv2DLocalReparameterization(4, 3, num_examples=1000)
    >>> layer(np.ones((2, 8, 8, 3), "float32")).shape == (2, 6, 6, 4)
    True
    """

    estimator = LocalReparameterization
    plain = keras.layers.Conv2D


@keras.saving.register_keras_serializable(package="kzoo")
class Conv3DFlipout(ConvVariational):
    """A 3D convolution with a distribution over its weights, estimated by Flipout.

    The kernel W is drawn from a posterior q with mean W̄. One perturbation ΔW̃ = W - W̄
    is drawn for the whole batch, and each row n turns its signs by random vectors s_n
    and r_n of -1 and +1, one number a channel, the same at all positions:

        y_n = φ(x_n * W̄ + ((x_n ∘ s_n) * ΔW̃) ∘ r_n + b).

    All else is as `kzoo.layers.DenseFlipout` says. Takes
    `tfp.layers.Convolution3DFlipout`'s arguments, those after `activation` by name, and
    `groups`.

    Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent
    Weight Perturbations on Mini-Batches", 2018. https://arxiv.org/abs/1803.04386

    Args:
        filters: Number of output channels.
        kernel_size: Integer or tuple of 3, the kernel's size.
        strides: Integer or tuple of 3.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to Keras's
            setting.
        dilation_rate: Integer or tuple of 3.
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
        groups: Into how many groups the channels are split.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        `[B, depth, height, width, channels]`, or with
        `data_format="channels_first"` `[B, channels, depth, height, width]`.

    Output shape:
        `[B, new_depth, new_height, new_width, filters]`, or likewise.

    Raises:
        ValueError: If an argument is out of range; when built, as `DenseFlipout`.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv3DFlipout
    >>> layer = Conv3DFlipout(4, 3, num_examples=1000)
    >>> layer(np.ones((2, 4, 4, 4, 3), "float32")).shape == (2, 2, 2, 2, 4)
    True
    """

    estimator = Flipout
    plain = keras.layers.Conv3D


@keras.saving.register_keras_serializable(package="kzoo")
class Conv3DReparameterization(ConvVariational):
    """A 3D convolution with a distribution over its weights, drawn once a call.

    All rows share one draw of the kernel, W ~ q: y = φ(x * W + b). See
    `Conv3DFlipout`, which differs in the estimator alone.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        **kwargs: `Conv3DFlipout`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        `[B, depth, height, width, channels]`, or with
        `data_format="channels_first"` `[B, channels, depth, height, width]`.

    Output shape:
        `[B, new_depth, new_height, new_width, filters]`, or likewise.

    Raises:
        ValueError: As `Conv3DFlipout`, but any posterior is taken.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv3DReparameterization
    >>> layer = Conv3DReparameterization(4, 3, num_examples=1000)
    >>> layer(np.ones((2, 4, 4, 4, 3), "float32")).shape == (2, 2, 2, 2, 4)
    True
    """

    estimator = Reparameterization
    plain = keras.layers.Conv3D


@keras.saving.register_keras_serializable(package="kzoo")
class Conv3DLocalReparameterization(ConvVariational):
    """A 3D convolution with a distribution over its weights; outputs are drawn.

    Each output has the distribution it has under a normal posterior N(W̄, σ²), and is
    drawn for itself, with ε ~ N(0, 1): y = φ(x * W̄ + ε ∘ sqrt(x² * σ²) + b). Outputs
    at different positions share the kernel and so would covary; here they do not. See
    `Conv3DFlipout`, which differs in the estimator alone.

    Reference: Kingma, Salimans, Welling, "Variational Dropout and the Local
    Reparameterization Trick", 2015. https://arxiv.org/abs/1506.02557

    Args:
        **kwargs: `Conv3DFlipout`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        `[B, depth, height, width, channels]`, or with
        `data_format="channels_first"` `[B, channels, depth, height, width]`.

    Output shape:
        `[B, new_depth, new_height, new_width, filters]`, or likewise.

    Raises:
        ValueError: As `Conv3DFlipout`; when built, if the posterior is not normal.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv3DLocalReparameterization
    >>> layer = Conv3DLocalReparameterization(4, 3, num_examples=1000)
    >>> layer(np.ones((2, 4, 4, 4, 3), "float32")).shape == (2, 2, 2, 2, 4)
    True
    """

    estimator = LocalReparameterization
    plain = keras.layers.Conv3D
