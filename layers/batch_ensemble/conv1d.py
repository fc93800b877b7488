"""Conv1DBatchEnsemble."""

import keras

from .conv import ConvBatchEnsemble


@keras.saving.register_keras_serializable(package="kzoo")
class Conv1DBatchEnsemble(ConvBatchEnsemble):
    """M one-dimensional convolutions that share one kernel.

    Member m's kernel is the shared W with its input channels scaled by the member's
    fast weights r_m and its output channels by s_m:

        y = φ(((x ∘ r_m) * W) ∘ s_m + b_m).

    All else is as `kzoo.layers.Conv2DBatchEnsemble` says. Takes its arguments, those
    after `kernel_size` by name. (Of edward2's layer of this name, which has no `rank`,
    the third is `ensemble_size`.)

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        filters: Number of output channels.
        kernel_size: Integer: length of the window.
        rank: K, how many fast weights are summed.
        ensemble_size: M, the number of members.
        alpha_initializer: For `alpha`, r: `[M, channels]`, or `[K, M, channels]`.
        gamma_initializer: For `gamma`, s: `[M, filters]`, or `[K, M, filters]`.
        strides: Integer: steps along the sequence.
        padding: `"valid"`, `"same"`, or `"causal"`, which hides later positions.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `keras.config.image_data_format()`.
        activation: φ. Defaults to none.
        use_bias: Whether each member has a bias b_m.
        kernel_initializer: For `kernel`, W: `[length, channels / groups,
            filters]`.
        bias_initializer: For `bias`, b: `[M, filters]`.
        kernel_regularizer: Of W.
        bias_regularizer: Of b.
        activity_regularizer: Of the output.
        kernel_constraint: On W.
        bias_constraint: On b.
        dilation_rate: Integer: spacing of the window's elements.
        groups: Number of groups of channels convolved apart.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Member-major batch of sequences.

    Input shape:
        `[M * B, length, channels]`; with `channels_first`,
        `[M * B, channels, length]`.

    Output shape:
        `[M * B, length', filters]`; with `channels_first`,
        `[M * B, filters, length']`.

    Raises:
        ValueError: As `Conv2DBatchEnsemble`, of `keras.layers.Conv1D`.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv1DBatchEnsemble
    >>> layer = Conv1DBatchEnsemble(3, kernel_size=2, ensemble_size=2)
    >>> x = np.ones((8, 6, 1), "float32")  # four sequences for each member
    >>> layer(x).shape == (8, 5, 3)
    True
    >>> layer.count_params()  # 2 * 1 * 3 + 2 * (1 + 2 * 3)
    20
    """

    plain = keras.layers.Conv1D

    def __init__(self, filters, kernel_size, **kwargs):
        super().__init__(filters, kernel_size, **kwargs)
