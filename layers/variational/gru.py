"""Gated recurrent units with a distribution over their weights."""

import keras

from ..recurrent import GRUStep
from .estimators import Flipout, Reparameterization
from .recurrent import VariationalCell, VariationalRecurrentLayer


@keras.saving.register_keras_serializable(package="kzoo")
class GRUCellFlipout(GRUStep, VariationalCell):
    """The cell of `GRUFlipout`, for `keras.layers.RNN` and stacks of cells.

    Its weights are drawn once a sequence, as the layer's are. Called by itself it
    refuses; see `kzoo.layers.SimpleRNNCellFlipout`.

    Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent
    Weight Perturbations on Mini-Batches", 2018. https://arxiv.org/abs/1803.04386

    Args:
        **kwargs: `GRUFlipout`'s arguments, but those of the loop
            (`return_sequences`, `return_state`, `go_backwards`, `stateful`, `unroll`,
            `zero_output_for_mask`) and `activity_regularizer`. Cells of equal seeds
            draw alike: give the two of a `keras.layers.Bidirectional` their own.

    Call arguments:
        inputs: Tensor, the inputs of a step.
        states: List of the state h, `[B, units]`.
        training: Whether to drop inputs and units.

    Input shape:
        `[B, features]`.

    Output shape:
        `[B, units]`, and the list of the new state.

    Raises:
        ValueError: As `GRUFlipout`; when called outside of a sequence.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import GRUCellFlipout
    >>> layer = keras.layers.RNN([GRUCellFlipout(4), GRUCellFlipout(3)])
    >>> layer(np.ones((8, 10, 5), "float32")).shape == (8, 3)
    True
    """

    estimator = Flipout


@keras.saving.register_keras_serializable(package="kzoo")
class GRUCellReparameterization(GRUStep, VariationalCell):
    """The cell of `GRUReparameterization`, for `keras.layers.RNN`.

    See `GRUCellFlipout`, which differs in the estimator alone.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        **kwargs: `GRUCellFlipout`'s arguments.

    Call arguments:
        inputs: Tensor, the inputs of a step.
        states: List of the state h, `[B, units]`.
        training: Whether to drop inputs and units.

    Input shape:
        `[B, features]`.

    Output shape:
        `[B, units]`, and the list of the new state.

    Raises:
        ValueError: As `GRUCellFlipout`, but any posterior is taken.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import GRUCellReparameterization
    >>> layer = keras.layers.RNN(GRUCellReparameterization(3))
    >>> layer(np.ones((8, 10, 5), "float32")).shape == (8, 3)
    True
    """

    estimator = Reparameterization


@keras.saving.register_keras_serializable(package="kzoo")
class GRUFlipout(VariationalRecurrentLayer):
    """Gated recurrent units with a distribution over their weights, by Flipout.

    The kernel W `[features, 3 units]` and the recurrent kernel U `[units, 3 units]`,
    with the update gate z, the reset gate g and the candidate h side by side, are drawn
    from posteriors with means W̄ and Ū. Each row n turns the signs of the batch's
    perturbations ΔW̃ and ΔŨ by random vectors of its own, s and r of W, s' and r' of U,
    with r and r' over the outputs of all gates. All are drawn once a sequence and held
    over its steps t:

        x̂ = x_t W̄ + ((x_t ∘ s) ΔW̃) ∘ r + b,
        û = h_{t-1} Ū + ((h_{t-1} ∘ s') ΔŨ) ∘ r' + b',
        z = σ(x̂_z + û_z),   g = σ(x̂_g + û_g),   ĥ = φ(x̂_h + g ∘ û_h),
        h_t = z ∘ h_{t-1} + (1 - z) ∘ ĥ.

    Without `reset_after` the last part of û is that of g ∘ h_{t-1} in place of
    g ∘ û_h, and there is no b'.

    All else is as `kzoo.layers.SimpleRNNFlipout` says: the bias, the divergences,
    what is drawn anew when, and why there is no LocalReparameterization. Takes
    `keras.layers.GRU`'s arguments as that does `keras.layers.SimpleRNN`'s; a dropped
    input or unit is dropped for all gates, also where Keras's layer draws for each
    gate (with `recurrent_dropout`).

    Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent
    Weight Perturbations on Mini-Batches", 2018. https://arxiv.org/abs/1803.04386

    Args:
        units: Size of the state and of the output's last axis.
        activation: φ. Defaults to the hyperbolic tangent; None: none.
        recurrent_activation: σ. Defaults to the sigmoid.
        reset_after: Whether the reset comes after the product with U, not before it.
        dropout: Rate at which inputs are dropped in training, at least 0, below 1.
        recurrent_dropout: Rate at which units of the state are dropped.
        kernel_posterior_fn: Makes q of W, as `kzoo.layers.DenseFlipout`'s.
        kernel_prior_fn: Makes p of W. None: no divergence.
        kernel_divergence_fn: Function of q, p and a draw from q. Defaults to KL(q, p)
            in nats.
        recurrent_kernel_posterior_fn: Makes q of U, and so the following.
        recurrent_kernel_prior_fn: Makes p of U.
        recurrent_kernel_divergence_fn: Its divergence.
        bias_posterior_fn: Makes the posterior of the bias, `[2, 3 units]` with
            `reset_after`. Defaults to a single point. None: no bias.
        bias_prior_fn: Makes the bias's prior. Defaults to none.
        bias_divergence_fn: Its divergence.
        num_examples: N, what the divergences are divided by.
        seed: An integer, for the same draws again; with `go_backwards` they are
            others, so that the layers of a `keras.layers.Bidirectional` draw apart.
        return_sequences: Whether to return the outputs of all steps, not the last.
        return_state: Whether to return the last state too.
        go_backwards: Whether to run from the last step to the first, and return the
            outputs in that order.
        stateful: Whether the last states of a batch are the first of the next one.
        unroll: Whether to write the loop out, which compiles longer.
        zero_output_for_mask: Whether outputs of masked steps are 0, not those of the
            step before.
        activity_regularizer: Of the output.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        sequences: Tensor.
        initial_state: List of the first state, `[B, units]`. Defaults to zeros.
        mask: Booleans `[B, T]`; where False, the state stays as it is.
        training: Whether to drop inputs and units.

    Input shape:
        `[B, T, features]`.

    Output shape:
        `[B, units]`, or `[B, T, units]` with `return_sequences`; with `return_state` a
        tuple of that and the last state, `[B, units]`.

    Raises:
        ValueError: As `SimpleRNNFlipout`.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import GRUFlipout
    >>> layer = GRUFlipout(3, return_state=True, num_examples=1000, seed=0)
    >>> y, h = layer(np.ones((8, 10, 5), "float32"))
    >>> y.shape == h.shape == (8, 3)
    True
    """

    cell_class = GRUCellFlipout


@keras.saving.register_keras_serializable(package="kzoo")
class GRUReparameterization(VariationalRecurrentLayer):
    """Gated recurrent units with a distribution over their weights, drawn once a call.

    All rows and all steps share one draw of the kernels, W and U: the projections are
    x̂ = x_t W + b and û = h_{t-1} U + b'. See `GRUFlipout`, which differs in the
    estimator alone.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        **kwargs: `GRUFlipout`'s arguments.

    Call arguments:
        sequences: Tensor.
        initial_state: List of the first state, `[B, units]`. Defaults to zeros.
        mask: Booleans `[B, T]`; where False, the state stays as it is.
        training: Whether to drop inputs and units.

    Input shape:
        `[B, T, features]`.

    Output shape:
        As `GRUFlipout`'s.

    Raises:
        ValueError: As `GRUFlipout`, but any posterior is taken.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import GRUReparameterization
    >>> x = np.ones((2, 10, 5), "float32")
    >>> y = np.asarray(GRUReparameterization(3, seed=0)(x))
    >>> bool((y[0] == y[1]).all())  # equal rows, equal weights
    True
    """

    cell_class = GRUCellReparameterization
