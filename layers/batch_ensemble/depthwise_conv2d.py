"""DepthwiseConv2DBatchEnsemble."""

import keras

from ..ops.arguments import integer
from .base import ChannelBatchEnsemble


@keras.saving.register_keras_serializable(package="kzoo")
class DepthwiseConv2DBatchEnsemble(ChannelBatchEnsemble):
    """M two-dimensional depthwise convolutions that share one kernel.

    Each input channel c is convolved with D = `depth_multiplier` kernels of its own,
    which make the output channels c * D to c * D + D - 1. Member m's kernel is the
    shared W ∘ (r_m s_mᵀ), r_m scaling the input's channels and s_m the output's:

        y = φ(((x ∘ r_m) * W) ∘ s_m + b_m).

    An output channel reads one input channel, so what r_m and s_m do to it is one
    factor, and rank above 1 makes no other kernels possible. Both are there as in
    edward2's layer, and so that all of the family can be initialized alike.

    All else is as `kzoo.layers.Conv2DBatchEnsemble` says. Takes
    `edward2.layers.DepthwiseConv2DBatchEnsemble`'s arguments, in its order, then
    `keras.layers.DepthwiseConv2D`'s `dilation_rate`, and `rank`, which come last.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        kernel_size: Integer or pair: height and width of the window.
        rank: K, how many fast weights are summed.
        ensemble_size: M, the number of members.
        alpha_initializer: For `alpha`, r: `[M, channels]`, or `[K, M, channels]`.
        gamma_initializer: For `gamma`, s: `[M, channels * D]`, or
            `[K, M, channels * D]`.
        strides: Integer or pair: steps along height and width.
        padding: `"valid"` or `"same"`.
        depth_multiplier: D, how many output channels each input channel has.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `keras.config.image_data_format()`.
        activation: φ. Defaults to none.
        use_bias: Whether each member has a bias b_m.
        depthwise_initializer: For `kernel`, W: `[height, width, channels, D]`.
        bias_initializer: For `bias`, b: `[M, channels * D]`.
        depthwise_regularizer: Of W.
        bias_regularizer: Of b.
        activity_regularizer: Of the output.
        depthwise_constraint: On W.
        bias_constraint: On b.
        dilation_rate: Integer or pair: spacing of the window's elements.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Member-major batch of images.

    Input shape:
        `[M * B, height, width, channels]`; with `channels_first`,
        `[M * B, channels, height, width]`.

    Output shape:
        `[M * B, height', width', channels * D]`; with `channels_first`,
        `[M * B, channels * D, height', width']`.

    Raises:
        ValueError: If `depth_multiplier`, `rank` or `ensemble_size` is not an integer
            of at least 1, or `keras.layers.DepthwiseConv2D` refuses an argument; when
            called, if M does not divide the number of rows.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import DepthwiseConv2DBatchEnsemble
    >>> layer = DepthwiseConv2DBatchEnsemble(2, ensemble_size=2, depth_multiplier=3)
    >>> x = np.ones((8, 4, 4, 5), "float32")  # four images for each of two members
    >>> layer(x).shape == (8, 3, 3, 15)
    True
    >>> layer.count_params()  # 2 * 2 * 5 * 3 + 2 * (5 + 2 * 15)
    130
    """

    def __init__(
        self,
        kernel_size,
        ensemble_size=4,
        alpha_initializer="ones",
        gamma_initializer="ones",
        strides=1,
        padding="valid",
        depth_multiplier=1,
        data_format=None,
        activation=None,
        use_bias=True,
        depthwise_initializer="glorot_uniform",
        bias_initializer="zeros",
        depthwise_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        depthwise_constraint=None,
        bias_constraint=None,
        dilation_rate=1,
        rank=1,
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
        self._share(
            keras.layers.DepthwiseConv2D,
            {
                "kernel_size": kernel_size,
                "strides": strides,
                "padding": padding,
                "depth_multiplier": integer("depth_multiplier", depth_multiplier),
                "data_format": data_format,
                "dilation_rate": dilation_rate,
                "depthwise_initializer": depthwise_initializer,
                "depthwise_regularizer": depthwise_regularizer,
                "depthwise_constraint": depthwise_constraint,
            },
            use_bias=False,
        )

    def _outer(self, r, s):
        return r[:, None] * s.reshape(len(r), -1)
