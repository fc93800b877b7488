import keras
import numpy as np
import pytest
from keras import ops

from kzoo.layers.ops.recurrent import gru_step, lstm_step

rng = np.random.default_rng(0)
B, H = 4, 3
h, c = rng.normal(size=(2, B, H)).astype("float32")
zeros = np.zeros((B, 1), "float32")


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def plain(cell, width):
    """Keras's cell with random weights of its state, and none of its inputs."""
    cell = cell(H, recurrent_activation="hard_sigmoid", activation="softsign")
    cell.build((B, 1))
    cell.recurrent_kernel.assign(rng.normal(size=(H, width)))
    return cell, ops.convert_to_numpy(cell.recurrent_kernel)


@pytest.mark.parametrize("reset_after", [True, False])
def test_gru(reset_after):
    def make(*args, **kwargs):
        return keras.layers.GRUCell(*args, reset_after=reset_after, **kwargs)

    cell, kernel = plain(make, 3 * H)
    x = rng.normal(size=3 * H).astype("float32")
    bias = np.stack([x, 0 * x]) if reset_after else x
    cell.bias.assign(bias)
    u, activations = h @ kernel, (cell.activation, cell.recurrent_activation)
    if reset_after:
        found = gru_step(np.tile(x, (B, 1)), u, h, *activations)
    else:

        def candidate(reset):
            return ops.matmul(reset, kernel[:, 2 * H :])

        u = u[:, : 2 * H]
        found = gru_step(np.tile(x, (B, 1)), u, h, *activations, candidate)
    np.testing.assert_allclose(numpy(found), numpy(cell(zeros, [h])[0]), 1e-5, 1e-6)


def test_lstm():
    cell, kernel = plain(keras.layers.LSTMCell, 4 * H)
    x = rng.normal(size=4 * H).astype("float32")
    cell.bias.assign(x)
    found = lstm_step(x + h @ kernel, c, cell.activation, cell.recurrent_activation)
    _, expected = cell(zeros, [h, c])
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(numpy(ours), numpy(theirs), 1e-5, 1e-6)


def test_by_hand():
    """With identities for activations."""

    def identity(x):
        return x

    state, carry = lstm_step(np.array([[2.0, 3.0, 5.0, 7.0]]), 11.0, identity, identity)
    assert float(numpy(carry)[0, 0]) == 3 * 11 + 2 * 5
    assert float(numpy(state)[0, 0]) == 7 * (3 * 11 + 2 * 5)
    x, u = np.array([[2.0, 3.0, 5.0]]), np.array([[1.0, 1.0, 4.0]])
    # z = 3, r = 4, h' = z h + (1 - z) (x_h + r u_h).
    found = gru_step(x, u, 10.0, identity, identity)
    assert float(numpy(found)[0, 0]) == 3 * 10 - 2 * (5 + 4 * 4)
    found = gru_step(x, u[:, :2], 10.0, identity, identity, lambda reset: reset + 1)
    assert float(numpy(found)[0, 0]) == 3 * 10 - 2 * (5 + 41)
