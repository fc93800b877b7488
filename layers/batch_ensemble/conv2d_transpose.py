"""Conv2DTransposeBatchEnsemble."""

import keras

from ..ops.arguments import integer
from .base import ChannelBatchEnsemble


@keras.saving.register_keras_serializable(package="kzoo")
class Conv2DTransposeBatchEnsemble(ChannelBatchEnsemble):
    """M two-dimensional transposed convolutions that share one kernel.

    Member m's kernel is the shared W with its input channels scaled by the member's
    fast weights r_m and its output channels by s_m. With W⊤ the transpose of the
    convolution by W,

        y = φ((W⊤ (x ∘ r_m)) ∘ s_m + b_m).

    All else is as `kzoo.layers.Conv2DBatchEnsemble` says. Takes its arguments but
    `groups`, and `keras.layers.Conv2DTranspose`'s `output_padding`.

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
        kernel_initializer: For `kernel`, W: `[height, width, filters, channels]`.
        bias_initializer: For `bias`, b: `[M, filters]`.
        kernel_regularizer: Of W.
        bias_regularizer: Of b.
        activity_regularizer: Of the output.
        kernel_constraint: On W.
        bias_constraint: On b.
        output_padding: Integer or pair: what is added to the output's height and width.
            Defaults to what the other arguments need.
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
        ValueError: If `filters`, `rank` or `ensemble_size` is not an integer of at
            least 1, or `keras.layers.Conv2DTranspose` refuses an argument; when
            called, if M does not divide the number of rows.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv2DTransposeBatchEnsemble
    >>> layer = Conv2DTransposeBatchEnsemble(3, 2, strides=2, ensemble_size=2)
    >>> x = np.ones((8, 3, 3, 1), "float32")  # four images for each of two members
    >>> layer(x).shape == (8, 6, 6, 3)
    True
    >>> layer.count_params()  # 2 * 2 * 1 * 3 + 2 * (1 + 2 * 3)
    26
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
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        output_padding=None,
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
            keras.layers.Conv2DTranspose,
            {
                "filters": self.filters,
                "kernel_size": kernel_size,
                "strides": strides,
                "padding": padding,
                "output_padding": output_padding,
                "data_format": data_format,
                "dilation_rate": dilation_rate,
                "kernel_initializer": kernel_initializer,
                "kernel_regularizer": kernel_regularizer,
                "kernel_constraint": kernel_constraint,
            },
            use_bias=False,
        )

    def _outer(self, r, s):
        return s[:, None] * r  # The kernel is `[..., out, in]`.
