"""Conv3DBatchEnsemble."""

import keras

from .conv import ConvBatchEnsemble


@keras.saving.register_keras_serializable(package="kzoo")
class Conv3DBatchEnsemble(ConvBatchEnsemble):
    """M three-dimensional convolutions that share one kernel.

    Member m's kernel is the shared W with its input channels scaled by the member's
    fast weights r_m and its output channels by s_m:

        y = φ(((x ∘ r_m) * W) ∘ s_m + b_m).

    All else is as `kzoo.layers.Conv2DBatchEnsemble` says. Takes its arguments, in its
    order.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        filters: Number of output channels.
        kernel_size: Integer or triple: depth, height and width of the window.
        rank: K, how many fast weights are summed.
        ensemble_size: M, the number of members.
        alpha_initializer: For `alpha`, r: `[M, channels]`, or `[K, M, channels]`.
        gamma_initializer: For `gamma`, s: `[M, filters]`, or `[K, M, filters]`.
        strides: Integer or triple: steps along depth, height and width.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `keras.config.image_data_format()`.
        activation: φ. Defaults to none.
        use_bias: Whether each member has a bias b_m.
        kernel_initializer: For `kernel`, W: `[depth, height, width, channels / groups,
            filters]`.
        bias_initializer: For `bias`, b: `[M, filters]`.
        kernel_regularizer: Of W.
        bias_regularizer: Of b.
        activity_regularizer: Of the output.
        kernel_constraint: On W.
        bias_constraint: On b.
        dilation_rate: Integer or triple: spacing of the window's elements.
        groups: Number of groups of channels convolved apart.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Member-major batch of volumes.

    Input shape:
        `[M * B, depth, height, width, channels]`; with `channels_first`,
        `[M * B, channels, depth, height, width]`.

    Output shape:
        `[M * B, depth', height', width', filters]`; with `channels_first`,
        `[M * B, filters, depth', height', width']`.

    Raises:
        ValueError: As `Conv2DBatchEnsemble`, of `keras.layers.Conv3D`.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv3DBatchEnsemble
    >>> layer = Conv3DBatchEnsemble(3, kernel_size=2, ensemble_size=2)
    >>> x = np.ones((8, 4, 4, 4, 1), "float32")  # four volumes for each member
    >>> layer(x).shape == (8, 3, 3, 3, 3)
    True
    >>> layer.count_params()  # 8 * 1 * 3 + 2 * (1 + 2 * 3)
    38
    """

    plain = keras.layers.Conv3D
