"""One step of a recurrent network, after its weights.

A step projects its inputs, x W + b, and its state, h U; what is here takes these
projections and has no weights, so a cell may make its products as it likes. σ is the
gates' activation and φ the other one. Gates lie side by side on the last axis, in
Keras's order.
"""

from keras import ops


def gru_gates(x, u, h, activation, recurrent_activation, candidate=None):
    """Update gate z and candidate ĥ of a gated recurrent unit, with its reset gate r.

        z = σ(x_z + u_z),   r = σ(x_r + u_r),
        ĥ = φ(x_h + r ∘ u_h)   or, with `candidate`,   ĥ = φ(x_h + candidate(r ∘ h)).

    Args:
        x: The projected inputs, `[B, 3 H]`: z, r, h.
        u: The projected state, `[B, 3 H]`; of `candidate` only z and r, `[B, 2 H]`.
        h: The state, `[B, H]`.
        activation: φ.
        recurrent_activation: σ.
        candidate: Function that projects the state once it is reset. None: the reset
            comes after the projection.

    Returns:
        z and ĥ, each `[B, H]`.
    """
    x_z, x_r, x_h = ops.split(x, 3, axis=-1)
    u_z, u_r, *u_h = ops.split(u, 3 if candidate is None else 2, axis=-1)
    z, r = recurrent_activation(x_z + u_z), recurrent_activation(x_r + u_r)
    reset = r * u_h[0] if candidate is None else candidate(r * h)
    return z, activation(x_h + reset)


def gru_step(x, u, h, activation, recurrent_activation, candidate=None):
    """A gated recurrent unit: h' = z ∘ h + (1 - z) ∘ ĥ, with `gru_gates`'s z and ĥ.

    Args:
        x: The projected inputs, `[B, 3 H]`: z, r, h.
        u: The projected state, `[B, 3 H]`; of `candidate` only z and r, `[B, 2 H]`.
        h: The state, `[B, H]`.
        activation: φ.
        recurrent_activation: σ.
        candidate: As `gru_gates` takes it.

    Returns:
        h', `[B, H]`.
    """
    z, new = gru_gates(x, u, h, activation, recurrent_activation, candidate)
    return z * h + (1 - z) * new


def lstm_step(z, c, activation, recurrent_activation):
    """Long short-term memory: input, forget and output gates i, f, o; carry c.

        i = σ(z_i),   f = σ(z_f),   o = σ(z_o),
        c' = f ∘ c + i ∘ φ(z_c),   h' = o ∘ φ(c').

    Args:
        z: The sum of the projected inputs and state, `[B, 4 H]`: i, f, c, o.
        c: The carry, `[B, H]`.
        activation: φ.
        recurrent_activation: σ.

    Returns:
        h' and c', each `[B, H]`.
    """
    z_i, z_f, z_c, z_o = ops.split(z, 4, axis=-1)
    i, f, o = (recurrent_activation(gate) for gate in (z_i, z_f, z_o))
    c = f * c + i * activation(z_c)
    return o * activation(c), c
