"""RevLSTM and its cell."""

import keras
import numpy as np
from keras import ops

from .base import ReversibleCell, ReversibleLayer
from .loop import Coupling


@keras.saving.register_keras_serializable(package="kzoo")
class RevLSTMCell(ReversibleCell):
    """The cell of `RevLSTM`, for `keras.layers.RNN` and stacks of cells.

    As `RevGRUCell`: the layer alone saves memory.

    Reference: MacKay, Vicol, Ba, Grosse, "Reversible Recurrent Neural Networks", 2018.
    https://arxiv.org/abs/1810.10999

    Args:
        units: As `RevLSTM`'s.
        activation: φ.
        unit_forget_bias: Whether the bias of f starts 1 higher.
        **kwargs: `RevLSTM`'s arguments, but those of the loop (`return_sequences`,
            `return_state`, `go_backwards`, `stateful`, `zero_output_for_mask`) and
            `activity_regularizer`.

    Call arguments:
        inputs: Tensor, the inputs of a step.
        states: List of the state h and the carry c, `[B, units]` each.
        training: Whether to drop inputs and units.

    Input shape:
        `[B, features]`.

    Output shape:
        `[B, units]`, and the list of the new state and carry.

    Raises:
        ValueError: As `RevLSTM`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import RevLSTMCell
    >>> layer = keras.layers.RNN([RevLSTMCell(4), RevLSTMCell(2)])
    >>> layer(np.ones((8, 10, 5), "float32")).shape == (8, 2)
    True
    """

    def __init__(self, units, activation="tanh", *, unit_forget_bias=False, **kwargs):
        super().__init__(units, activation, **kwargs)
        self.unit_forget_bias = unit_forget_bias

    @property
    def couplings(self):
        """c¹ and h¹ by h², then c² and h² by h¹; f and p are gates that may forget."""
        forgets = bool(self.fixed.forget_bits)
        carry, state = 2 + forgets, 1 + forgets
        return (
            Coupling(2, (1,), carry),
            Coupling(0, (1, 2), state),
            Coupling(3, (0,), carry),
            Coupling(1, (0, 3), state),
        )

    @property
    def state_size(self):
        """Units of the state and of the carry."""
        return [self.units, self.units]

    def _first_bias(self, shape, dtype=None):
        """Of a carry's coupling the last gate is f."""
        bias = self.bias_initializer(shape, dtype=dtype)
        if not (self.unit_forget_bias and self.fixed.forget_bits):
            return bias
        carries = (2, 3)
        gates = [np.eye(c.gates)[-1] * (c.part in carries) for c in self.couplings]
        forget = np.repeat(np.concatenate(gates), self.units // 2)
        return bias + ops.cast(forget, bias.dtype)

    def make(self, number, x, reads, weights):
        """Of a carry: i ∘ g and f. Of a state: o ∘ φ(c) and p."""
        h, *carry = reads
        (kernel,) = weights["recurrent"]
        z = self._linear(x, weights) + self._linear_of_state(h, kernel)
        z = ops.split(z, self.couplings[number].gates, axis=-1)
        if carry:
            candidate = self.activation(*carry)
        else:
            candidate = self.activation(z.pop(1))
        v, *forget = (self.recurrent_activation(gate) for gate in z)
        return (v * candidate, *forget)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "unit_forget_bias": self.unit_forget_bias}


@keras.saving.register_keras_serializable(package="kzoo")
class RevLSTM(ReversibleLayer):
    """Long short-term memory that trains without keeping its states.

    The halves of the state h and of the carry c update each other:

        [i; g; f; o; p] = W¹ x_t + U¹ h²_{t-1} + b¹,  with σ of i, f, o, p and φ of g,
        c¹_t = f ∘ c¹_{t-1} + i ∘ g,
        h¹_t = p ∘ h¹_{t-1} + o ∘ φ(c¹_t),

    and then so for c² and h², of the new h¹_t. All are had again from the last ones, as
    `kzoo.layers.RevGRU` says, which see: of fixed point, of the limit k on what the
    gates f and p forget, of gradients. As both forget, the memory of a training step
    grows by 8 bytes in ⌊32 / k⌋ steps a unit. With `max_forget_bits` = 0 there are no f
    and p, which are 1.

    h and c may grow by up to 1 a step: with `state_bits` b they wrap at 2^(31 - b), so
    that for states carried over T steps 2^(31 - b) is to be more than T. Where gates
    stay open in training, h grows without end, or does so later in a text that was not
    trained on. A `recurrent_activation` of at most s < 1, such as 0.97 σ, keeps both
    below about 1 / ((1 - 2^-k) (1 - s)), where (1 - 2^-k) (1 - s) is several times
    2^-`gate_bits`, so that no gate rounds to 1; and with a bias of p that starts at -2
    h is at first nearly LSTM's, o ∘ φ(c) (benchmarks/language_model.py trains it so). A
    long warm-up of the learning rate helps too.

    Takes `keras.layers.LSTM`'s arguments, but `unroll` and `use_cudnn`. Dropped inputs
    and units are the same at all steps and for all gates.

    Reference: MacKay, Vicol, Ba, Grosse, "Reversible Recurrent Neural Networks", 2018.
    https://arxiv.org/abs/1810.10999

    Args:
        units: Size of the state, the carry and the output's last axis, even.
        activation: φ. Defaults to the hyperbolic tangent; None: none.
        recurrent_activation: σ, with values from 0 to 1. Defaults to the sigmoid.
        unit_forget_bias: Whether the bias of f starts 1 higher. Not so by default: the
            limit on what is forgotten raises f already.
        kernel_initializer: Of W, `[features, 5 units]`, which has the columns of i, g,
            f, o and p for c¹ and h¹, then those for c² and h².
        recurrent_initializer: Of U, `[units / 2, 5 units]`.
        bias_initializer: Of b, `[5 units]`.
        **kwargs: `RevGRU`'s other arguments.

    Call arguments:
        sequences: Tensor.
        initial_state: List of the first state and carry, `[B, units]` each. Defaults
            to zeros.
        mask: Booleans `[B, T]`; where False, state and carry stay as they are.
        training: Whether to drop inputs and units.

    Input shape:
        `[B, T, features]`.

    Output shape:
        `[B, output_units]`, or `[B, T, output_units]` with `return_sequences`; with
        `return_state` a tuple of that, the last state and the last carry, `[B, units]`
        each.

    Raises:
        ValueError: As `RevGRU`.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import RevLSTM
    >>> layer = RevLSTM(4, max_forget_bits=3, return_state=True)
    >>> y, h, c = layer(np.ones((8, 10, 5), "float32"))
    >>> y.shape == h.shape == c.shape == (8, 4)
    True
    """

    cell_class = RevLSTMCell
