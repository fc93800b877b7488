"""Simple recurrent layers with a distribution over their weights."""

import keras

from ..recurrent import SimpleRNNStep
from .estimators import Flipout, Reparameterization
from .recurrent import VariationalCell, VariationalRecurrentLayer


@keras.saving.register_keras_serializable(package="kzoo")
class SimpleRNNCellFlipout(SimpleRNNStep, VariationalCell):
    """The cell of `SimpleRNNFlipout`, for `keras.layers.RNN` and stacks of cells.

    Its weights are drawn once a sequence, as the layer's are, because Keras's
    recurrent layers say when a sequence begins and ends. They say it to their cell,
    and to those of a `keras.layers.StackedRNNCells`; called by itself or by a cell
    around it the cell refuses, as it would draw other weights at each step.

    See `SimpleRNNFlipout`, whose equations and reference are this cell's.

    Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent
    Weight Perturbations on Mini-Batches", 2018. https://arxiv.org/abs/1803.04386

    Args:
        **kwargs: `SimpleRNNFlipout`'s arguments, but those of the loop
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
        ValueError: As `SimpleRNNFlipout`; when called outside of a sequence.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import SimpleRNNCellFlipout
    >>> cells = [SimpleRNNCellFlipout(4), SimpleRNNCellFlipout(3)]
    >>> layer = keras.layers.RNN(cells)
    >>> layer(np.ones((8, 10, 5), "float32")).shape == (8, 3)
    True
    """

    estimator = Flipout


@keras.saving.register_keras_serializable(package="kzoo")
class SimpleRNNCellReparameterization(SimpleRNNStep, VariationalCell):
    """The cell of `SimpleRNNReparameterization`, for `keras.layers.RNN`.

    See `SimpleRNNCellFlipout`, which differs in the estimator alone.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        **kwargs: `SimpleRNNCellFlipout`'s arguments.

    Call arguments:
        inputs: Tensor, the inputs of a step.
        states: List of the state h, `[B, units]`.
        training: Whether to drop inputs and units.

    Input shape:
        `[B, features]`.

    Output shape:
        `[B, units]`, and the list of the new state.

    Raises:
        ValueError: As `SimpleRNNCellFlipout`, but any posterior is taken.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import SimpleRNNCellReparameterization
    >>> layer = keras.layers.RNN(SimpleRNNCellReparameterization(3))
    >>> layer(np.ones((8, 10, 5), "float32")).shape == (8, 3)
    True
    """

    estimator = Reparameterization


@keras.saving.register_keras_serializable(package="kzoo")
class SimpleRNNFlipout(VariationalRecurrentLayer):
    """A simple recurrent layer with a distribution over its weights, by Flipout.

    The kernel W and the recurrent kernel U are drawn from posteriors with means W̄ and
    Ū. Perturbations ΔW̃ and ΔŨ are drawn for the whole batch, and each row n turns
    their signs by random vectors of -1 and +1: s_n and r_n those of ΔW̃, s'_n and r'_n
    those of ΔŨ. All are drawn once a sequence and held over its steps t, so that row
    n runs with weights W̄ + ΔW̃ ∘ (s_n r_nᵀ) and Ū + ΔŨ ∘ (s'_n r'_nᵀ):

        h_t = φ(x_t W̄ + ((x_t ∘ s) ΔW̃) ∘ r + b + h_{t-1} Ū + ((h_{t-1} ∘ s') ΔŨ) ∘
        r').

    A bias with a distribution is drawn once a sequence too, the same for all rows.
    Each call is a sequence, also where `stateful` goes on from the states of the last
    one: its weights are new, so that the gradients of two training steps have no noise
    in common. To go on with the same weights, predict by `kzoo.layers.PosteriorSamples`
    with an integer seed and pass the states as inputs: it does not take `stateful`
    layers, whose states have one row an example, not one a sample.

    The divergences KL(q, p) of all weights are added to the model's losses once a step,
    divided by `num_examples`; see `kzoo.layers.DenseFlipout`. Posteriors, priors and
    biases have its defaults too. There is no LocalReparameterization: it draws
    outputs, not weights, anew for each row and step, and so no sequence would have one
    function.

    Takes `keras.layers.SimpleRNN`'s arguments, but those of the weights'
    initializers, regularizers and constraints, which the posteriors have
    (`kzoo.layers.MeanFieldNormal`), and `use_bias`, which is `bias_posterior_fn=None`.
    All but `units` and `activation` go by name. Dropped inputs and units are the same
    at all steps.

    Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent
    Weight Perturbations on Mini-Batches", 2018. https://arxiv.org/abs/1803.04386

    Args:
        units: Size of the state and of the output's last axis.
        activation: φ. Defaults to the hyperbolic tangent; None: none.
        dropout: Rate at which inputs are dropped in training, at least 0, below 1.
        recurrent_dropout: Rate at which units of the state are dropped.
        kernel_posterior_fn: Makes q of W, as `kzoo.layers.DenseFlipout`'s.
        kernel_prior_fn: Makes p of W. None: no divergence.
        kernel_divergence_fn: Function of q, p and a draw from q. Defaults to KL(q, p)
            in nats.
        recurrent_kernel_posterior_fn: Makes q of U, and so the following.
        recurrent_kernel_prior_fn: Makes p of U.
        recurrent_kernel_divergence_fn: Its divergence.
        bias_posterior_fn: Makes the bias's posterior. Defaults to a single point. None:
            no bias.
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
        ValueError: If `units` or `num_examples` is not above 0 or a dropout not in
            [0, 1), or on JAX if a function is not one of kzoo's; when built, if the q
            of a kernel is not symmetric about its mean with independent entries.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import SimpleRNNFlipout
    >>> layer = SimpleRNNFlipout(3, num_examples=1000, seed=0)
    >>> layer(np.ones((8, 10, 5), "float32")).shape == (8, 3)
    True
    """

    cell_class = SimpleRNNCellFlipout


@keras.saving.register_keras_serializable(package="kzoo")
class SimpleRNNReparameterization(VariationalRecurrentLayer):
    """A simple recurrent layer with a distribution over its weights, drawn once a call.

    All rows and all steps share one draw of the kernels, W and U:

        h_t = φ(x_t W + b + h_{t-1} U).

    See `SimpleRNNFlipout`, which differs in the estimator alone.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        **kwargs: `SimpleRNNFlipout`'s arguments.

    Call arguments:
        sequences: Tensor.
        initial_state: List of the first state, `[B, units]`. Defaults to zeros.
        mask: Booleans `[B, T]`; where False, the state stays as it is.
        training: Whether to drop inputs and units.

    Input shape:
        `[B, T, features]`.

    Output shape:
        As `SimpleRNNFlipout`'s.

    Raises:
        ValueError: As `SimpleRNNFlipout`, but any posterior is taken.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import SimpleRNNReparameterization
    >>> x = np.ones((2, 10, 5), "float32")
    >>> y = np.asarray(SimpleRNNReparameterization(3, seed=0)(x))
    >>> bool((y[0] == y[1]).all())  # equal rows, equal weights
    True
    """

    cell_class = SimpleRNNCellReparameterization
