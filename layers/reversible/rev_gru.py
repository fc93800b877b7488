"""RevGRU and its cell."""

import keras

from ..ops.recurrent import gru_gates
from .base import ReversibleCell, ReversibleLayer
from .loop import Coupling


@keras.saving.register_keras_serializable(package="kzoo")
class RevGRUCell(ReversibleCell):
    """The cell of `RevGRU`, for `keras.layers.RNN` and stacks of cells.

    Its steps and weights are the layer's, but around it Keras's loop keeps the states
    of all steps for the gradient: the layer alone saves memory. States pass from step
    to step in the compute dtype, which holds all bits of those of float32 below 2.

    Reference: MacKay, Vicol, Ba, Grosse, "Reversible Recurrent Neural Networks", 2018.
    https://arxiv.org/abs/1810.10999

    Args:
        **kwargs: `RevGRU`'s arguments, but those of the loop (`return_sequences`,
            `return_state`, `go_backwards`, `stateful`, `zero_output_for_mask`) and
            `activity_regularizer`.

    Call arguments:
        inputs: Tensor, the inputs of a step.
        states: List of the state h, `[B, units]`.
        training: Whether to drop inputs and units.

    Input shape:
        `[B, features]`.

    Output shape:
        `[B, units]`, and the list of the new state.

    Raises:
        ValueError: As `RevGRU`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import RevGRUCell
    >>> layer = keras.layers.RNN([RevGRUCell(4), RevGRUCell(2)])
    >>> layer(np.ones((8, 10, 5), "float32")).shape == (8, 2)
    True
    """

    mixes = True
    couplings = (Coupling(0, (1,), 3), Coupling(1, (0,), 3))

    @property
    def recurrent_parts(self):
        """Outputs of a coupling's U: those of z and r before those of the candidate."""
        return slice(self.units), slice(self.units, None)

    def make(self, number, x, reads, weights):
        """The candidate g and the gate z, of the inputs and the other half."""
        (h,) = reads
        of_gates, of_candidate = weights["recurrent"]
        z, g = gru_gates(
            self._linear(x, weights),
            self._linear_of_state(h, of_gates),
            h,
            self.activation,
            self.recurrent_activation,
            lambda reset: self._linear_of_state(reset, of_candidate),
        )
        return (g, z) if self.fixed.forget_bits else ((1 - z) * g,)


@keras.saving.register_keras_serializable(package="kzoo")
class RevGRU(ReversibleLayer):
    """Gated recurrent units that train without keeping their states.

    The state's two halves h¹ and h² update each other, with σ the gates' activation,
    φ the other one:

        [z¹; r¹] = σ(W¹ x_t + U¹ h²_{t-1} + b¹),
        g¹ = φ(V¹ x_t + T¹ (r¹ ∘ h²_{t-1}) + d¹),
        h¹_t = z¹ ∘ h¹_{t-1} + (1 - z¹) ∘ g¹,

    and then so for h², of the new h¹_t. So h²_{t-1} is had again from h²_t and h¹_t,
    h¹_{t-1} from that and h¹_t, and what ordinary backpropagation keeps of all steps is
    computed on the way back. That is exact: the state is in fixed point, with
    `state_bits` bits after the point, the gates are multiples of 2^-`gate_bits`, and
    the bits that z ∘ h loses are kept. A gate is limited to z = 2^-k + (1 - 2^-k) σ(.)
    with k = `max_forget_bits`, so that these are k bits at most, a step and unit. The
    memory of a training step grows with them, by 4 bytes in ⌊32 / k⌋ steps a unit,
    beside the inputs, returned outputs and their gradients.

    With k = 0 the state is perfectly reversible, h_t = h_{t-1} + (1 - z) ∘ g, and
    nothing is kept; it forgets nothing either, and grows.

    A gradient runs over the sequence once more, there and back, and nothing is kept
    for it until then. Both ways run through the same compiled code, so that gates are
    the same to the bit whatever the compiler has made of it; should the way back not
    end at the first state all the same, gradients are NaN. They pass straight through
    rounding, and cannot be differentiated again: JAX refuses that, and what TensorFlow
    gives is NaN. Those of the cell in a `keras.layers.RNN`, which keeps its steps, can.

    Unlike in the paper z is one number where it scales h and in 1 - z, the rounded
    one, so that |h| never exceeds 1 (there a gate that rounds to 1 adds its
    (1 - z) g all the same); and what is multiplied is rounded, as
    `kzoo.layers.ops.reversible` says.

    Takes `keras.layers.GRU`'s arguments, but `reset_after` (the reset comes before the
    product with U), `unroll` and `use_cudnn`. Dropped inputs and units are the same at
    all steps and for all gates; `kzoo.layers.WeightDrop` drops entries of U.

    Reference: MacKay, Vicol, Ba, Grosse, "Reversible Recurrent Neural Networks", 2018.
    https://arxiv.org/abs/1810.10999

    Args:
        units: Size of the state and of the output's last axis, an even number.
        activation: φ. Defaults to the hyperbolic tangent; None: none.
        recurrent_activation: σ, with values from 0 to 1. Defaults to the sigmoid.
        max_forget_bits: k, from 0 to `gate_bits`; the paper's are 1, 2, 3 and 5. None:
            `gate_bits`, which limits nothing.
        state_bits: Bits of the state after the point, from 1 to 30; there are 31 with
            those before, beyond which numbers wrap.
        gate_bits: Bits of a gate after the point, from 1 to 15.
        use_bias: Whether there is b.
        kernel_initializer: Of W, `[features, 3 units]`, which has the columns of z, r
            and g for h¹, then those for h².
        recurrent_initializer: Of U, `[units / 2, 3 units]`.
        bias_initializer: Of b, `[3 units]`.
        kernel_regularizer: Of W.
        recurrent_regularizer: Of U.
        bias_regularizer: Of b.
        activity_regularizer: Of the output.
        kernel_constraint: Of W.
        recurrent_constraint: Of U.
        bias_constraint: Of b.
        dropout: Rate at which inputs are dropped in training, at least 0, below 1.
        recurrent_dropout: Rate at which units are dropped from products with U.
        seed: An integer, for the same draws again; with `go_backwards` they are
            others, so that the layers of a `keras.layers.Bidirectional` draw apart.
        output_units: How many units an output has: the first ones of h. Those of all
            steps that are returned are kept, and others are not. Defaults to all.
        return_sequences: Whether to return the outputs of all steps, not the last.
        return_state: Whether to return the last state too.
        go_backwards: Whether to run from the last step to the first, and return the
            outputs in that order.
        stateful: Whether the last states of a batch are the first of the next one.
        zero_output_for_mask: Whether outputs of masked steps are 0, not the state.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        sequences: Tensor.
        initial_state: List of the first state, `[B, units]`. Defaults to zeros.
        mask: Booleans `[B, T]`; where False, the state stays as it is.
        training: Whether to drop inputs and units.

    Input shape:
        `[B, T, features]`.

    Output shape:
        `[B, output_units]`, or `[B, T, output_units]` with `return_sequences`; with
        `return_state` a tuple of that and the last state, `[B, units]`.

    Raises:
        ValueError: If `units` is odd, the numbers of bits, the rates or `output_units`
            are not within their bounds, or `unroll` is True.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import RevGRU
    >>> layer = RevGRU(4, max_forget_bits=3, return_state=True)
    >>> y, h = layer(np.ones((8, 10, 5), "float32"))
    >>> y.shape == h.shape == (8, 4)
    True
    """

    cell_class = RevGRUCell
