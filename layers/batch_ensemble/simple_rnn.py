"""SimpleRNNBatchEnsemble and its cell."""

import keras

from ..recurrent import SimpleRNNStep
from .recurrent import BatchEnsembleCell, BatchEnsembleRecurrentLayer


@keras.saving.register_keras_serializable(package="kzoo")
class SimpleRNNCellBatchEnsemble(SimpleRNNStep, BatchEnsembleCell):
    """The cell of `SimpleRNNBatchEnsemble`, for `keras.layers.RNN` and stacks of cells.

    See `SimpleRNNBatchEnsemble`, whose equations and weights are this cell's. Keras's
    recurrent layers tell their cell, or those of a `keras.layers.StackedRNNCells`, when
    a sequence begins and ends: dropped inputs and units are then the same at all
    steps. Called by itself the cell drops others at each call.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        **kwargs: `SimpleRNNBatchEnsemble`'s arguments, but those of the loop
            (`return_sequences`, `return_state`, `go_backwards`, `stateful`, `unroll`,
            `zero_output_for_mask`) and `activity_regularizer`.

    Call arguments:
        inputs: Member-major tensor, the inputs of a step.
        states: List of the state h, `[M * B, units]`.
        training: Whether to drop inputs and units.

    Input shape:
        `[M * B, features]`.

    Output shape:
        `[M * B, units]`, and the list of the new state.

    Raises:
        ValueError: As `SimpleRNNBatchEnsemble`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import SimpleRNNCellBatchEnsemble
    >>> cells = [SimpleRNNCellBatchEnsemble(n, ensemble_size=2) for n in (4, 3)]
    >>> layer = keras.layers.RNN(cells)
    >>> layer(np.ones((8, 10, 5), "float32")).shape == (8, 3)
    True
    """

    plain = keras.layers.SimpleRNNCell


@keras.saving.register_keras_serializable(package="kzoo")
class SimpleRNNBatchEnsemble(BatchEnsembleRecurrentLayer):
    """M simple recurrent layers that share their kernels.

    Member m's kernel is W ∘ (r_m s_mᵀ) and its recurrent kernel U ∘ (r'_m s'_mᵀ): the
    shared W and U with their rows scaled by the member's fast weights r_m and r'_m and
    their columns by s_m and s'_m. The batch is member-major, its first B sequences for
    member 0, the next B for member 1, and so on; each sequence uses its own member's
    weights at all steps t, and all go through W and U together:

        h_t = φ(((x_t ∘ r_m) W) ∘ s_m + b_m + ((h_{t-1} ∘ r'_m) U) ∘ s'_m).

    With rank K, the kernels are W ∘ (sum_k r_mk s_mkᵀ) and U ∘ (sum_k r'_mk s'_mkᵀ), at
    K times the work.

    A model of M members has hardly more weights than one: those of W and U, and for
    each member `features + 4 * units`. `TileMembers` and `AverageMembers` put the same
    sequences before every member and average what they predict. Under `tf.distribute`
    each replica splits its own part of the batch among the members, so M must divide
    the rows of every replica.

    Takes `keras.layers.SimpleRNN`'s arguments and `DenseBatchEnsemble`'s; all but
    `units` and `activation` go by name. With the default fast weights all members start
    alike: see `batch_ensemble_initializer`. Dropped inputs and units are each row's
    own, and the same at all steps. The plain cell that owns W and U is `layer.shared`,
    which can be frozen by itself (`layer.shared.trainable = False`).

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        units: Size of the state and of the output's last axis.
        activation: φ. Defaults to the hyperbolic tangent; None: none.
        rank: K, how many fast weights are summed.
        ensemble_size: M, the number of members.
        use_bias: Whether each member has a bias b_m.
        alpha_initializer: For `alpha`, which holds r: `[M, features]`, or
            `[K, M, features]` with rank K > 1.
        gamma_initializer: For `gamma`, which holds s: `[M, units]`, or `[K, M, units]`.
        recurrent_alpha_initializer: For `recurrent_alpha`, which holds r':
            `[M, units]`, or `[K, M, units]`.
        recurrent_gamma_initializer: For `recurrent_gamma`, which holds s', likewise.
        kernel_initializer: For `kernel`, W: `[features, units]`.
        recurrent_initializer: For `recurrent_kernel`, U: `[units, units]`.
        bias_initializer: For `bias`, b: `[M, units]`.
        kernel_regularizer: Of W.
        recurrent_regularizer: Of U.
        bias_regularizer: Of b.
        activity_regularizer: Of the output.
        kernel_constraint: On W.
        recurrent_constraint: On U.
        bias_constraint: On b.
        dropout: Rate at which inputs are dropped in training, at least 0, below 1.
        recurrent_dropout: Rate at which units of the state are dropped.
        seed: An integer, for the same drops again; with `go_backwards` they are
            others, so that the layers of a `keras.layers.Bidirectional` drop apart.
        return_sequences: Whether to return the outputs of all steps, not the last.
        return_state: Whether to return the last state too.
        go_backwards: Whether to run from the last step to the first, and return the
            outputs in that order.
        stateful: Whether the last states of a batch are the first of the next one.
        unroll: Whether to write the loop out, which compiles longer.
        zero_output_for_mask: Whether outputs of masked steps are 0, not those of the
            step before.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        sequences: Member-major tensor.
        initial_state: List of the first state, `[M * B, units]`. Defaults to zeros.
        mask: Booleans `[M * B, T]`; where False, the state stays as it is.
        training: Whether to drop inputs and units.

    Input shape:
        `[M * B, T, features]`.

    Output shape:
        `[M * B, units]`, or `[M * B, T, units]` with `return_sequences`; with
        `return_state` a tuple of that and the last state, `[M * B, units]`.

    Raises:
        ValueError: If `units`, `rank` or `ensemble_size` is not an integer of at least
            1, or a dropout not in [0, 1); when called, if M does not divide the number
            of rows (in a TensorFlow graph that learns the number only when it runs,
            that is an InvalidArgumentError).

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import SimpleRNNBatchEnsemble
    >>> layer = SimpleRNNBatchEnsemble(3, ensemble_size=2)
    >>> x = np.ones((8, 10, 5), "float32")  # four sequences for each of two members
    >>> layer(x).shape == (8, 3)
    True
    >>> layer.count_params()  # 5 * 3 + 3 * 3 + 2 * (5 + 4 * 3)
    58
    """

    cell_class = SimpleRNNCellBatchEnsemble
    plain = keras.layers.SimpleRNN
