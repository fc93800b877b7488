import keras
import numpy as np
import pytest
from keras import ops

from harness.curvature import check_same_step, observed, of_one_example
from harness.training import EAGER, QUICK, XLA
from kzoo.optimizers import KFAC
from kzoo.optimizers.kfac.blocks.base import find_blocks

L = keras.layers
SLOW = pytest.mark.slow
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


def steps_of(w, u, b, x, h):
    """Of h_t = tanh(s_t), s_t = x_t W + h_{t-1} U + b: [x_t, h_{t-1}, 1] and ∂h_T/∂s_t.

    Of one example, with arrays `[T, n + units + 1]` and `[T, units, units]`.
    """
    rows, slopes = [], []
    for x_t in x:
        rows.append(np.concatenate([x_t, h, [1.0]]))
        h = np.tanh(x_t @ w + h @ u + b)
        slopes.append(1 - h**2)
    jacobians, of_h = [], np.eye(len(h))
    for slope in slopes[::-1]:
        jacobians.append(of_h * slope)
        of_h = jacobians[-1] @ u.T
    return np.stack(rows), np.stack(jacobians[::-1])


def simple_network(masking=False):
    layers = [L.Masking()] if masking else []
    model = keras.Sequential([keras.Input((3, 2)), *layers, L.SimpleRNN(2)])
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=v.shape) for v in model.get_weights()])
    return model, rng.normal(size=(2, 3, 2)).astype("float32")


@pytest.mark.parametrize("masking", [False, True])
def test_steps_are_positions(masking):
    # The loss is |y - h_T|² / D, D = 2: its curvature by h_T is I.
    model, x = simple_network(masking)
    lengths = [2, 3] if masking else [3, 3]
    for x_n, length in zip(x, lengths, strict=True):
        x_n[: 3 - length] = 0
    ((_, found),) = observed(model, x, approximation="lag_one")
    steps = [
        steps_of(*model.get_weights(), x_n[3 - length :], np.zeros(2))
        for x_n, length in zip(x, lengths, strict=True)
    ]
    count = sum(lengths)
    expected = {
        "A": sum(a.T @ a for a, _ in steps) / count,
        "G": sum(np.einsum("tci,tcj->ij", j, j) for _, j in steps) / 2,
        "T": count / 2,
        "A_next": sum(a[1:].T @ a[:-1] for a, _ in steps) / count,
        "G_next": sum(np.einsum("tci,tcj->ij", j[1:], j[:-1]) for _, j in steps) / 2,
    }
    for factor, one in zip(found, expected.values(), strict=True):
        np.testing.assert_allclose(factor, one, rtol=1e-4, atol=1e-6)
    # Kronecker's factors are the same.
    ((_, plain),) = observed(model, x)
    for one, other in zip(plain, found[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_reduced_steps_are_averaged_and_summed():
    model, x = simple_network()
    ((_, (a, g)),) = observed(model, x, sharing="reduce")
    steps = [steps_of(*model.get_weights(), x_n, np.zeros(2)) for x_n in x]
    mean = np.stack([a.mean(0) for a, _ in steps])
    np.testing.assert_allclose(a, mean.T @ mean / 2, rtol=1e-4)
    summed = [j.sum(0) for _, j in steps]
    np.testing.assert_allclose(g, sum(j.T @ j for j in summed) / 2, rtol=1e-4)


def mean_square(model, given, part):
    """The diagonal of the curvature, from the examples' gradients one by one."""
    of_each = [
        of_one_example(model, [x[n : n + 1] for x in given], part)
        for n in range(len(given[0]))
    ]
    return np.mean([np.diag(one) for one in of_each], axis=0)


KINDS = {
    "simple": lambda **kwargs: L.SimpleRNN(3, **kwargs),
    "lstm": lambda **kwargs: L.LSTM(3, **kwargs),
    "gru": lambda **kwargs: L.GRU(3, **kwargs),
    "cell": lambda **kwargs: L.RNN(L.LSTMCell(3), **kwargs),
}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_an_example_has_one_gradient_of_all_its_steps(name, backwards):
    # Sequences that begin, end and pause with steps that a mask leaves out, in states
    # of their own.
    layer = KINDS[name](go_backwards=backwards, unroll=name == "simple")
    x = keras.Input((4, 2))
    states = [keras.Input((3,)) for _ in layer.state_size]
    there = ops.any(x != 0, axis=-1)
    model = keras.Model([x, *states], layer(x, initial_state=states, mask=there))
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    given = [rng.normal(size=(4, *i.shape[1:])).astype("float32") for i in model.inputs]
    given[0][0, :2] = given[0][1, 3:] = given[0][2, 1] = 0
    parts = [
        (part, d)
        for part, (d,) in observed(model, given, approximation="diagonal")
        if part.block
    ]
    assert len(parts) == 1 + (name == "gru")
    for part, d in parts:
        expected = mean_square(model, given, part)
        np.testing.assert_allclose(d.ravel(), expected, rtol=1e-3, atol=1e-5)


def test_what_a_layer_returns_is_not_what_its_steps_read():
    # After a pause the state is that before it, whatever the outputs are in between.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 2)).astype("float32")
    x[0, 1] = x[1, :2] = 0
    weights, found = None, []
    for returned in ({}, {"return_state": True, "zero_output_for_mask": True}):
        inputs = keras.Input((4, 2))
        layer = L.SimpleRNN(3, return_sequences=bool(returned), **returned)
        outputs = layer(L.Masking()(inputs))
        model = keras.Model(inputs, outputs[-1] if returned else outputs)
        weights = weights or [rng.normal(size=w.shape) for w in model.get_weights()]
        model.set_weights(weights)
        ((_, factors),) = observed(model, x)
        found.append(factors)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_stateful_layer_goes_on_from_its_state():
    layer = L.SimpleRNN(2, stateful=True)
    model = keras.Sequential([keras.Input(batch_shape=(1, 3, 2)), layer])
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=v.shape) for v in model.get_weights()])
    before, x = rng.normal(size=(2, 1, 3, 2)).astype("float32")
    model.predict(before, verbose=0)
    state = ops.convert_to_numpy(layer.states[0])
    ((_, (a, _)),) = observed(model, x, fisher="sampled")
    rows, _ = steps_of(*layer.get_weights()[:3], x[0], state[0])
    np.testing.assert_allclose(a, rows.T @ rows / 3, rtol=1e-4)
    np.testing.assert_array_equal(layer.states[0], state)


def test_a_cell_of_two_layers_has_both_uses():
    # The second layer's steps, and those of a cell by itself, are examples.
    cell = L.SimpleRNNCell(2)
    x = keras.Input((3, 2))
    first = L.RNN(cell, return_sequences=True)(x)
    model = keras.Model(x, L.RNN(cell)(first))
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=v.shape) for v in model.get_weights()])
    x = rng.normal(size=(1, 3, 2)).astype("float32")
    w, u, b = model.get_weights()
    ((_, (a, g)),) = observed(model, x)
    rows, _ = steps_of(w, u, b, x[0], np.zeros(2))
    h = np.concatenate([rows[1:, 2:4], np.tanh(rows[-1:] @ np.vstack([w, u, b]))])
    of_second, jacobians = steps_of(w, u, b, h, np.zeros(2))
    both = np.concatenate([rows, of_second])
    np.testing.assert_allclose(a, both.T @ both / 6, rtol=1e-4)
    # By the states of the first layer, whose last derivative is that of h_3.
    of_second = np.einsum("tci,tcj->ij", jacobians, jacobians)
    of_first, of_h = 0.0, np.zeros((2, 2))
    for row, j in zip(h[::-1], jacobians[::-1], strict=True):
        of_s = (of_h + j @ w.T) * (1 - row**2)
        of_first, of_h = of_first + of_s.T @ of_s, of_s @ u.T
    np.testing.assert_allclose(g, of_first + of_second, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["lag_one", "lag_one_limit"])
def test_of_one_step_lags_change_nothing(name):
    # Nor in layers without steps, or cells that a stack runs.
    x = keras.Input((1, 2))
    stacked = L.RNN([L.SimpleRNNCell(2), L.GRUCell(2, use_bias=False)])
    model = keras.Model(x, L.Dense(2)(stacked(L.LSTM(3, return_sequences=True)(x))))
    weights = model.get_weights()
    given, y = np.random.default_rng(0).normal(size=(2, 6, 1, 2)).astype("float32")
    changes = []
    for approximation in ("kronecker", name):
        model.set_weights(weights)
        optimizer = KFAC(model, 1.0, approximation=approximation, seed=0)
        model.compile(optimizer, "mse", **QUICK)
        model.train_on_batch(given, y[:, 0])
        changes.append(
            [w - v for w, v in zip(model.get_weights(), weights, strict=True)]
        )
    assert np.abs(changes[0][0]).max() > 0.01
    for one, other in zip(*changes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.tensorflow  # On JAX not compiling is running eagerly, which takes long.
@pytest.mark.parametrize(
    "approximation",
    ["lag_one", *(pytest.param(s, marks=SLOW) for s in ("lag_one_limit", "ekfac"))],
)
def test_compiled_steps_are_the_same(approximation):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3, 2)), rng.normal(size=(6, 2))
    x[0, :2] = x[1, 1:] = 0
    layers = [L.Masking(), L.GRU(3, use_bias=False), L.Dense(2)]
    start, found = None, []
    for mode in (EAGER, XLA):
        model = keras.Sequential([keras.Input((None, 2)), *layers])
        start = start or model.get_weights()
        model.set_weights(start)
        arguments = {"inverse_update_period": 1, "fisher": "exact", "seed": 0}
        optimizer = KFAC(model, 0.1, approximation=approximation, **arguments)
        model.compile(optimizer, "mse", **mode)
        for _ in range(2):
            model.train_on_batch(x, y)
        found.append(model.get_weights())
    for one, other, before in zip(*found, start, strict=True):
        assert np.abs(one - before).max() > 1e-3
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.tensorflow  # Without damping float32 is not enough.
@pytest.mark.parametrize("approximation", ["kronecker", "lag_one", "lag_one_limit"])
@pytest.mark.parametrize("name", ["simple", "lstm"])
def test_undamped_steps_do_not_depend_on_the_coordinates(name, approximation):
    # Of x, and of the states where another layer reads them through a fixed map.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40, 4, 2))
    b, c, m = rng.normal(size=(2, 2)), rng.normal(size=2), rng.normal(size=(3, 3))
    layer = KINDS[name](return_sequences=True, dtype="float64")
    fixed = L.Dense(3, use_bias=False, trainable=False, dtype="float64")
    last = L.Dense(2, dtype="float64")
    model = keras.Sequential([keras.Input((4, 2), dtype="float64"), layer, fixed, last])
    weights = [rng.normal(size=w.shape) for w in model.get_weights()]
    outputs = []
    for changed in (False, True):
        kernel, recurrent, bias, of_fixed, *of_last = weights
        given, of_fixed = x, np.eye(3)
        if changed:
            given, kernel = x @ b + c, np.linalg.solve(b, kernel)
            bias = bias - c @ kernel
            of_fixed, of_last[0] = m, np.linalg.solve(m, of_last[0])
        model.set_weights([kernel, recurrent, bias, of_fixed, *of_last])
        start = ops.convert_to_numpy(model(given))
        arguments = {"damping": 1e-18, "momentum": 0.0, "seed": 0}
        optimizer = KFAC(model, 0.1, approximation=approximation, **arguments)
        model.compile(optimizer, "mse", **QUICK)
        model.train_on_batch(given, y)
        outputs.append((start, ops.convert_to_numpy(model(given))))
    check_same_step(*outputs)


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


@pytest.mark.slow
def test_the_biases_of_a_gru_compile():
    def trained(compiled):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((None, 2)), LAYERS["gru"]()])
        model.compile(KFAC(model, learning_rate=1.0, seed=0), "mse", **compiled)
        x, y = np.random.default_rng(0).normal(size=(2, 2, 3)).astype("float32")
        # From `fit`, batches have a size that is not known when they are traced.
        model.fit(x[:, None, :2], y, verbose=0)
        return np.concatenate([w.ravel() for w in model.get_weights()])

    np.testing.assert_allclose(trained(XLA), trained(QUICK), rtol=1e-3, atol=1e-4)
