"""DenseBatchEnsemble."""

import keras

from ..ops.arguments import integer
from .base import ChannelBatchEnsemble


@keras.saving.register_keras_serializable(package="kzoo")
class DenseBatchEnsemble(ChannelBatchEnsemble):
    """M dense layers that share one kernel.

    Member m's kernel is W ∘ (r_m s_mᵀ): the shared W with its rows scaled by the
    member's fast weights r_m and its columns by s_m. The batch is member-major, its
    first B rows for member 0, the next B for member 1, and so on; each row uses its
    own member's weights, and all rows go through W in one product:

        y = φ(((x ∘ r_m) W) ∘ s_m + b_m).

    With rank K, member m's kernel is W ∘ (sum_k r_mk s_mkᵀ), at K times the work.

    A model of M members has hardly more weights than one: the kernel's, and for each
    member `input_dim + 2 * units`. `TileMembers` and `AverageMembers` put the same
    rows before every member and average what they predict.

    Under `tf.distribute` each replica splits its own part of the batch among the
    members, so M must divide the rows of every replica.

    Takes `edward2.layers.DenseBatchEnsemble`'s arguments, in its order, with its
    defaults. With the default ones all members start alike: see
    `batch_ensemble_initializer`. (With rank K, ones also start at K W.) What differs:

    - inputs may have more than two axes, as `keras.layers.Dense`'s may;
    - `activity_regularizer` sees the layer's output, not what precedes s;
    - the config holds `rank`;
    - the plain layer that owns W is `layer.shared`, not `layer.dense`.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        units: Size of the output's last axis.
        rank: K, how many fast weights are summed.
        ensemble_size: M, the number of members.
        activation: φ. Defaults to none.
        use_bias: Whether each member has a bias b_m.
        alpha_initializer: For `alpha`, which holds r: `[M, input_dim]`, or
            `[K, M, input_dim]` with rank K > 1.
        gamma_initializer: For `gamma`, which holds s: `[M, units]`, or
            `[K, M, units]`.
        kernel_initializer: For `kernel`, W: `[input_dim, units]`.
        bias_initializer: For `bias`, b: `[M, units]`.
        kernel_regularizer: Of W.
        bias_regularizer: Of b.
        activity_regularizer: Of the output.
        kernel_constraint: On W.
        bias_constraint: On b.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Member-major tensor. Its mask is passed on.

    Input shape:
        `[M * B, ..., input_dim]`.

    Output shape:
        `[M * B, ..., units]`.

    Raises:
        ValueError: If `rank`, `ensemble_size` or `units` is not an integer of at
            least 1; when called, if M does not divide the number of rows (in a
            TensorFlow graph that learns the number only when it runs, that is an
            InvalidArgumentError).

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import DenseBatchEnsemble
    >>> layer = DenseBatchEnsemble(3, ensemble_size=2)
    >>> x = np.ones((8, 5), "float32")  # four rows for each of the two members
    >>> layer(x).shape == (8, 3)
    True
    >>> layer.count_params()  # 5 * 3 + 2 * (5 + 2 * 3)
    37
    """

    def __init__(
        self,
        units,
        rank=1,
        ensemble_size=4,
        activation=None,
        use_bias=True,
        alpha_initializer="ones",
        gamma_initializer="ones",
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
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
        self.units = integer("units", units)
        self._share(
            keras.layers.Dense,
            {
                "units": self.units,
                "kernel_initializer": kernel_initializer,
                "kernel_regularizer": kernel_regularizer,
                "kernel_constraint": kernel_constraint,
            },
            use_bias=False,
        )
        self.supports_masking = True
