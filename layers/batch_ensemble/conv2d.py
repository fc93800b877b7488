"""Conv2DBatchEnsemble."""

import keras

from .conv import ConvBatchEnsemble


@keras.saving.register_keras_serializable(package="kzoo")
class Conv2DBatchEnsemble(ConvBatchEnsemble):
    """M two-dimensional convolutions that share one kernel.

    Member m's kernel is the shared W with its input channels scaled by the member's
    fast weights r_m and its output channels by s_m. The batch is member-major, its
    first B rows for member 0, the next B for member 1, and so on; each row uses its
    own member's weights, and all rows go through W in one convolution:

        y = φ(((x ∘ r_m) * W) ∘ s_m + b_m).

    With rank K, the sum of K such terms before b_m, at K times the work.

    A model of M members has hardly more weights than one: the kernel's, and for each
    member `channels + 2 * filters`. `TileMembers` and `AverageMembers` put the same
    rows before every member and average what they predict.

    Under `tf.distribute` each replica splits its own part of the batch among the
    members, so M must divide the rows of every replica.

    Takes `edward2.layers.Conv2DBatchEnsemble`'s arguments, in its order, with its
    defaults, and `keras.layers.Conv2D`'s `dilation_rate` and `groups`. With the
    default ones all members start alike: see `batch_ensemble_initializer`. (With
    rank K, ones also start at K W.) What differs:

    - rank above 1 works with `channels_last` (edward2 adds the bias along the wrong
      axis there);
    - the config can be given back to the constructor, and holds `rank`;
    - the output's shape is known;
    - the members' biases are `layer.bias`, not `layer.ensemble_bias`, and the plain
      layer that owns W is `layer.shared`.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        filters: Number of output channels.
        kernel_size: Integer or pair: height and width of the window.
        rank: K, how many fast weights are summed.
        ensemble_size: M, the number of members.
        alpha_initializer: For `alpha`, which holds r: `[M, channels]`, or
            `[K, M, channels]` with rank K > 1.
        gamma_initializer: For `gamma`, which holds s: `[M, filters]`, or
            `[K, M, filters]`.
        strides: Integer or pair: steps along height and width.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `keras.config.image_data_format()`.
        activation: φ. Defaults to none.
        use_bias: Whether each member has a bias b_m.
        kernel_initializer: For `kernel`, W: `[height, width, channels / groups,
            filters]`.
        bias_initializer: For `bias`, b: `[M, filters]`.
        kernel_regularizer: Of W.
        bias_regularizer: Of b.
        activity_regularizer: Of the output.
        kernel_constraint: On W.
        bias_constraint: On b.
        dilation_rate: Integer or pair: spacing of the window's elements.
        groups: Number of groups of channels convolved apart.
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
            least 1, or `keras.layers.Conv2D` refuses an argument; when called, if M
            does not divide the number of rows (in a TensorFlow graph that learns the
            number only when it runs, that is an InvalidArgumentError).

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv2DBatchEnsemble
    >>> layer = Conv2DBatchEnsemble(3, kernel_size=3, ensemble_size=2)
    >>> x = np.ones((8, 6, 6, 1), "float32")  # four images for each of two members
    >>> layer(x).shape == (8, 4, 4, 3)
    True
    >>> layer.count_params()  # 3 * 3 * 1 * 3 + 2 * (1 + 2 * 3)
    41
    """

    plain = keras.layers.Conv2D
