"""GRUBatchEnsemble and its cell."""

import keras

from ..recurrent import GRUStep
from .recurrent import BatchEnsembleCell, BatchEnsembleRecurrentLayer


@keras.saving.register_keras_serializable(package="kzoo")
class GRUCellBatchEnsemble(GRUStep, BatchEnsembleCell):
    """The cell of `GRUBatchEnsemble`, for `keras.layers.RNN` and stacks of cells.

    See `GRUBatchEnsemble`, whose equations and weights are this cell's, and
    `SimpleRNNCellBatchEnsemble` for what is dropped.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        **kwargs: `GRUBatchEnsemble`'s arguments, but those of the loop
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
    >>> from kzoo.layers import GRUCellBatchEnsemble
    >>> cells = [GRUCellBatchEnsemble(n, ensemble_size=2) for n in (4, 3)]
    >>> layer = keras.layers.RNN(cells)
    >>> layer(np.ones((8, 10, 5), "float32")).shape == (8, 3)
    True
    """

    plain = keras.layers.GRUCell


@keras.saving.register_keras_serializable(package="kzoo")
class GRUBatchEnsemble(BatchEnsembleRecurrentLayer):
    """M layers of gated recurrent units that share their kernels.

    Member m's kernel is W ∘ (r_m s_mᵀ), `[features, 3 units]`, and its recurrent kernel
    U ∘ (r'_m s'_mᵀ), `[units, 3 units]`, with W and U shared, s_m and s'_m over the
    outputs of all gates, which lie side by side: z, r, h. The batch is member-major,
    its first B sequences for member 0, the next B for member 1, and so on; each
    sequence uses its own member's weights at all steps t:

        x̂ = ((x_t ∘ r_m) W) ∘ s_m + b_m,   û = ((h_{t-1} ∘ r'_m) U) ∘ s'_m + b'_m,
        z = σ(x̂_z + û_z),   r = σ(x̂_r + û_r),   ĥ = φ(x̂_h + r ∘ û_h),
        h_t = z ∘ h_{t-1} + (1 - z) ∘ ĥ.

    Without `reset_after` there is no b', and û_h is that of r ∘ h_{t-1}:

        ĥ = φ(x̂_h + ((r ∘ h_{t-1} ∘ r'_m) U_h) ∘ s'_mh).

    All else is as `SimpleRNNBatchEnsemble` says: higher ranks, what the layer takes
    besides `keras.layers.GRU`'s arguments, the plain cell that owns W and U. A dropped
    input or unit is dropped for all gates, also where Keras's layer draws for each
    gate (with `recurrent_dropout`).

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        units: Size of the state and of the output's last axis.
        activation: φ. Defaults to the hyperbolic tangent; None: none.
        recurrent_activation: σ. Defaults to the sigmoid.
        reset_after: Whether the reset gate comes after U, as in the first equations.
        rank: K, how many fast weights are summed.
        ensemble_size: M, the number of members.
        use_bias: Whether each member has biases.
        alpha_initializer: For `alpha`, which holds r: `[M, features]`, or
            `[K, M, features]` with rank K > 1.
        gamma_initializer: For `gamma`, which holds s: `[M, 3 units]`, or
            `[K, M, 3 units]`.
        recurrent_alpha_initializer: For `recurrent_alpha`, which holds r':
            `[M, units]`, or `[K, M, units]`.
        recurrent_gamma_initializer: For `recurrent_gamma`, which holds s':
            `[M, 3 units]`, or `[K, M, 3 units]`.
        kernel_initializer: For `kernel`, W.
        recurrent_initializer: For `recurrent_kernel`, U.
        bias_initializer: For `bias`, b and b': `[M, 2, 3 units]`; or b alone,
            `[M, 3 units]`.
        kernel_regularizer: Of W.
        recurrent_regularizer: Of U.
        bias_regularizer: Of b and b'.
        activity_regularizer: Of the output.
        kernel_constraint: On W.
        recurrent_constraint: On U.
        bias_constraint: On b and b'.
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
        ValueError: As `SimpleRNNBatchEnsemble`.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import GRUBatchEnsemble
    >>> layer = GRUBatchEnsemble(3, ensemble_size=2, return_state=True)
    >>> y, h = layer(np.ones((8, 10, 5), "float32"))  # four sequences a member
    >>> y.shape == h.shape == (8, 3)
    True
    """

    cell_class = GRUCellBatchEnsemble
    plain = keras.layers.GRU
