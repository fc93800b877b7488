"""SeparableConv2DBatchEnsemble."""

import keras

from ..conversion import numpy
from ..ops.arguments import integer
from .base import ChannelBatchEnsemble


@keras.saving.register_keras_serializable(package="kzoo")
class SeparableConv2DBatchEnsemble(ChannelBatchEnsemble):
    """M two-dimensional separable convolutions that share their kernels.

    A depthwise convolution by P, with D = `depth_multiplier` outputs for each channel,
    and a convolution by Q with a window of 1, nothing between them: one linear map of
    the channels. Member m's has the shared map's input channels scaled by r_m and its
    output channels by s_m:

        y = φ((((x ∘ r_m) * P) * Q) ∘ s_m + b_m).

    The channels between P and Q have no fast weights of their own. If D is 1, they
    would be r_m again, as P treats each channel by itself. If D is larger, they would
    give each of a channel's D maps a factor of its own; for that, put a
    `DepthwiseConv2DBatchEnsemble` before a `Conv2DBatchEnsemble` with a window of 1.

    All else is as `kzoo.layers.Conv2DBatchEnsemble` says. The plain layer that owns P
    and Q is `layer.shared`.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        filters: Number of output channels.
        kernel_size: Integer or pair: height and width of the window.
        rank: K, how many fast weights are summed.
        ensemble_size: M, the number of members.
        alpha_initializer: For `alpha`, r: `[M, channels]`, or `[K, M, channels]`.
        gamma_initializer: For `gamma`, s: `[M, filters]`, or `[K, M, filters]`.
        strides: Integer or pair: steps along height and width.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `keras.config.image_data_format()`.
        activation: φ. Defaults to none.
        use_bias: Whether each member has a bias b_m.
        depthwise_initializer: For `depthwise_kernel`, P: `[height, width, channels,
            D]`.
        pointwise_initializer: For `pointwise_kernel`, Q: `[1, 1, channels * D,
            filters]`.
        bias_initializer: For `bias`, b: `[M, filters]`.
        depthwise_regularizer: Of P.
        pointwise_regularizer: Of Q.
        bias_regularizer: Of b.
        activity_regularizer: Of the output.
        depthwise_constraint: On P.
        pointwise_constraint: On Q.
        bias_constraint: On b.
        depth_multiplier: D, how many maps P has of each channel.
        dilation_rate: Integer or pair: spacing of the window's elements.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Member-major batch of images.

    Input shape:
        `[M * B, height, width, channels]`; with `channels_first`,
        `[M * B, channels, height, width]`.

    Output shape:
        `[M * B, height', width', filters]`; with `channels_first`,
        `[M * B, filters, height', width']`.

    Raises:
        ValueError: If `filters`, `depth_multiplier`, `rank` or `ensemble_size` is
            not an integer of at least 1, or `keras.layers.SeparableConv2D` refuses an
            argument; when called, if M does not divide the number of rows.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import SeparableConv2DBatchEnsemble
    >>> layer = SeparableConv2DBatchEnsemble(3, kernel_size=2, ensemble_size=2)
    >>> x = np.ones((8, 4, 4, 5), "float32")  # four images for each of two members
    >>> layer(x).shape == (8, 3, 3, 3)
    True
    >>> layer.count_params()  # 2 * 2 * 5 + 5 * 3 + 2 * (5 + 2 * 3)
    57
    """

    def __init__(
        self,
        filters,
        kernel_size,
        rank=1,
        ensemble_size=4,
        alpha_initializer="ones",
        gamma_initializer="ones",
        strides=1,
        padding="valid",
        data_format=None,
        activation=None,
        use_bias=True,
        depthwise_initializer="glorot_uniform",
        pointwise_initializer="glorot_uniform",
        bias_initializer="zeros",
        depthwise_regularizer=None,
        pointwise_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        depthwise_constraint=None,
        pointwise_constraint=None,
        bias_constraint=None,
        depth_multiplier=1,
        dilation_rate=1,
        **kwargs,
    ):
        super().__init__(
            rank=rank,
            ensemble_size=ensemble_size,
            activation=activation,
            use_bias=use_bias,
            alpha_initializer=alpha_initializer,
            gamma_initializer=gamma_initializer,
            bias_initializer=bias_initializer,
            bias_regularizer=bias_regularizer,
            bias_constraint=bias_constraint,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        self.filters = integer("filters", filters)
        self._share(
            keras.layers.SeparableConv2D,
            {
                "filters": self.filters,
                "kernel_size": kernel_size,
                "strides": strides,
                "padding": padding,
                "depth_multiplier": integer("depth_multiplier", depth_multiplier),
                "data_format": data_format,
                "dilation_rate": dilation_rate,
                "depthwise_initializer": depthwise_initializer,
                "pointwise_initializer": pointwise_initializer,
                "depthwise_regularizer": depthwise_regularizer,
                "pointwise_regularizer": pointwise_regularizer,
                "depthwise_constraint": depthwise_constraint,
                "pointwise_constraint": pointwise_constraint,
            },
            use_bias=False,
        )

    @property
    def depthwise_kernel(self):
        """The kernel P that all members share."""
        return self.shared.depthwise_kernel

    @property
    def pointwise_kernel(self):
        """The kernel Q that all members share."""
        return self.shared.pointwise_kernel

    def _give_member(self, m, plain):
        if self.rank > 1:
            raise ValueError(
                "expected fast weights of rank 1: the sum of several separable maps is "
                f"none. Received: rank={self.rank}"
            )
        r, s = (numpy(w)[m] for w in self._fast_weights())
        plain.depthwise_kernel.assign(numpy(self.depthwise_kernel) * r[:, None])
        plain.pointwise_kernel.assign(numpy(self.pointwise_kernel) * s)
        if self.bias is not None:
            plain.bias.assign(numpy(self.bias)[m])
