import keras
import numpy as np
import pytest
from keras import ops

from harness.curvature import observed, of_one_example
from kzoo.optimizers.kfac.blocks.base import find_blocks

L = keras.layers
LAYERS = {
    "simple": lambda: L.SimpleRNN(3),
    "simple without bias": lambda: L.SimpleRNN(3, use_bias=False),
    "lstm": lambda: L.LSTM(3),
    "gru": lambda: L.GRU(3),
    "gru without bias": lambda: L.GRU(3, use_bias=False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_of_one_step_of_one_example_the_factors_are_exact(name):
    layer = LAYERS[name]()
    x, *states = keras.Input((1, 2)), keras.Input((3,)), keras.Input((3,))
    states = states[: 1 + (name == "lstm")]
    model = keras.Model([x, *states], layer(x, initial_state=states))
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    given = [rng.normal(size=(1, *i.shape[1:])).astype("float32") for i in model.inputs]
    parts = [(p, f) for p, f in observed(model, given) if p.block]
    assert len(parts) == 1 + ("gru" in name)
    for part, (a, g) in parts:
        expected = of_one_example(model, given, part)
        np.testing.assert_allclose(np.kron(a, g), expected, rtol=1e-3, atol=1e-5)


def test_steps_are_positions():
    # h_t = tanh(s_t), s_t = x_t W + h_{t-1} U + b, the loss is |y - h_T|² / D.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 2)).astype("float32")
    cell = L.SimpleRNN(2)
    model = keras.Sequential([keras.Input((3, 2)), cell])
    w, u, b = (rng.normal(size=v.shape) for v in model.get_weights())
    model.set_weights([w, u, b])
    ((_, (a, g)),) = observed(model, x)
    h, rows, slopes = np.zeros((2, 2)), [], []
    for t in range(3):
        rows.append(np.concatenate([x[:, t], h, np.ones((2, 1))], 1))
        h = np.tanh(x[:, t] @ w + h @ u + b)
        slopes.append(1 - h**2)
    rows = np.concatenate(rows)
    np.testing.assert_allclose(a, rows.T @ rows / 6, rtol=1e-4)
    expected = np.zeros((2, 2))
    for n in range(2):
        jacobian = np.eye(2)  # Of h_T by s_t.
        for t in (2, 1, 0):
            jacobian = jacobian @ np.diag(slopes[t][n])
            expected += jacobian.T @ jacobian / 2
            jacobian = jacobian @ u.T
    np.testing.assert_allclose(g, expected, rtol=1e-4, atol=1e-6)


def test_a_joint_matrix_is_split_as_it_was_joined():
    layer = L.LSTM(3)
    layer.build((None, 1, 2))
    (block,) = find_blocks(layer.cell)
    tensors = [ops.convert_to_tensor(v) for v in block.variables]
    tensors[2] = tensors[2] + 0.5
    w = block.join(tensors)
    assert tuple(w.shape) == block.full_shape == (6, 12)
    for one, other in zip(block.split(w), tensors, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "cell",
    [
        L.LSTMCell(3, dropout=0.1),
        L.GRUCell(3, recurrent_dropout=0.1),
        L.GRUCell(3, reset_after=False),
        L.LSTMCell(3, implementation=1),
    ],
)
def test_what_is_not_such_a_sum_has_no_block(cell):
    cell.build((None, 2))
    assert find_blocks(cell) == []
