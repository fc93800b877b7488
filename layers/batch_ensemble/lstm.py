"""LSTMBatchEnsemble and its cell."""

import keras

from ..recurrent import LSTMStep
from .recurrent import BatchEnsembleCell, BatchEnsembleRecurrentLayer


@keras.saving.register_keras_serializable(package="kzoo")
class LSTMCellBatchEnsemble(LSTMStep, BatchEnsembleCell):
    """The cell of `LSTMBatchEnsemble`, for `keras.layers.RNN` and stacks of cells.

    See `LSTMBatchEnsemble`, whose equations and weights are this cell's, and
    `SimpleRNNCellBatchEnsemble` for what is dropped.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        **kwargs: `LSTMBatchEnsemble`'s arguments, but those of the loop
            (`return_sequences`, `return_state`, `go_backwards`, `stateful`, `unroll`,
            `zero_output_for_mask`) and `activity_regularizer`.

    Call arguments:
        inputs: Member-major tensor, the inputs of a step.
        states: List of the state h and the carry c, each `[M * B, units]`.
        training: Whether to drop inputs and units.

    Input shape:
        `[M * B, features]`.

    Output shape:
        `[M * B, units]`, and the list of the new state and carry.

    Raises:
        ValueError: As `SimpleRNNBatchEnsemble`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import LSTMCellBatchEnsemble
    >>> cells = [LSTMCellBatchEnsemble(n, ensemble_size=2) for n in (4, 3)]
    >>> layer = keras.layers.RNN(cells)
    >>> layer(np.ones((8, 10, 5), "float32")).shape == (8, 3)
    True
    """

    plain = keras.layers.LSTMCell


@keras.saving.register_keras_serializable(package="kzoo")
class LSTMBatchEnsemble(BatchEnsembleRecurrentLayer):
    """M layers of long short-term memory that share their kernels.

    Member m's kernel is W ∘ (r_m s_mᵀ), `[features, 4 units]`, and its recurrent kernel
    U ∘ (r'_m s'_mᵀ), `[units, 4 units]`, with W and U shared, s_m and s'_m over the
    outputs of all gates, which lie side by side: i, f, c, o. The batch is member-major,
    its first B sequences for member 0, the next B for member 1, and so on; each
    sequence uses its own member's weights at all steps t:

        a_t = ((x_t ∘ r_m) W) ∘ s_m + b_m + ((h_{t-1} ∘ r'_m) U) ∘ s'_m,
        i, f, o = σ(a_i), σ(a_f), σ(a_o),
        c_t = f ∘ c_{t-1} + i ∘ φ(a_c),   h_t = o ∘ φ(c_t).

    All else is as `SimpleRNNBatchEnsemble` says: higher ranks, what the layer takes
    besides `keras.layers.LSTM`'s arguments, the plain cell that owns W and U. A dropped
    input or unit is dropped for all gates, also where Keras's layer draws for each
    gate (with `recurrent_dropout`).

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        units: Size of the states and of the output's last axis.
        activation: φ. Defaults to the hyperbolic tangent; None: none.
        recurrent_activation: σ. Defaults to the sigmoid.
        unit_forget_bias: Whether the forget gate's bias starts 1 higher than
            `bias_initializer` says. (Keras's layer starts it at 1.)
        rank: K, how many fast weights are summed.
        ensemble_size: M, the number of members.
        use_bias: Whether each member has a bias b_m.
        alpha_initializer: For `alpha`, which holds r: `[M, features]`, or
            `[K, M, features]` with rank K > 1.
        gamma_initializer: For `gamma`, which holds s: `[M, 4 units]`, or
            `[K, M, 4 units]`.
        recurrent_alpha_initializer: For `recurrent_alpha`, which holds r':
            `[M, units]`, or `[K, M, units]`.
        recurrent_gamma_initializer: For `recurrent_gamma`, which holds s':
            `[M, 4 units]`, or `[K, M, 4 units]`.
        kernel_initializer: For `kernel`, W.
        recurrent_initializer: For `recurrent_kernel`, U.
        bias_initializer: For `bias`, b: `[M, 4 units]`.
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
        return_state: Whether to return the last states too.
        go_backwards: Whether to run from the last step to the first, and return the
            outputs in that order.
        stateful: Whether the last states of a batch are the first of the next one.
        unroll: Whether to write the loop out, which compiles longer.
        zero_output_for_mask: Whether outputs of masked steps are 0, not those of the
            step before.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        sequences: Member-major tensor.
        initial_state: List of the first state and carry, each `[M * B, units]`.
            Defaults to zeros.
        mask: Booleans `[M * B, T]`; where False, the states stay as they are.
        training: Whether to drop inputs and units.

    Input shape:
        `[M * B, T, features]`.

    Output shape:
        `[M * B, units]`, or `[M * B, T, units]` with `return_sequences`; with
        `return_state` a tuple of that, the last state and the last carry, each
        `[M * B, units]`.

    Raises:
        ValueError: As `SimpleRNNBatchEnsemble`.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import LSTMBatchEnsemble
    >>> layer = LSTMBatchEnsemble(3, ensemble_size=2, return_sequences=True)
    >>> layer(np.ones((8, 10, 5), "float32")).shape == (8, 10, 3)
    True
    """

    cell_class = LSTMCellBatchEnsemble
    plain = keras.layers.LSTM
