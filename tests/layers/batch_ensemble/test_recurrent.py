import itertools

import keras
import numpy as np
import pytest
from keras import ops

from harness import check_cell, check_layer
from harness.backends import gradients
from harness.configs import check_config
from kzoo.layers import (
    GRUBatchEnsemble,
    GRUCellBatchEnsemble,
    LSTMBatchEnsemble,
    LSTMCellBatchEnsemble,
    SimpleRNNBatchEnsemble,
    SimpleRNNCellBatchEnsemble,
    batch_ensemble_initializer,
)
from kzoo.layers.recurrent import _HELD

CELLS = {
    SimpleRNNBatchEnsemble: SimpleRNNCellBatchEnsemble,
    GRUBatchEnsemble: GRUCellBatchEnsemble,
    LSTMBatchEnsemble: LSTMCellBatchEnsemble,
}
# What the contract is kept with, but for the loop.
ARGUMENTS = {
    "units": 2,
    "activation": "softsign",
    "rank": 2,
    "ensemble_size": 2,
    **{
        f"{name}_initializer": batch_ensemble_initializer(-0.5, seed=i)
        for i, name in enumerate(
            ("alpha", "gamma", "recurrent_alpha", "recurrent_gamma")
        )
    },
    "kernel_initializer": "he_normal",
    "recurrent_initializer": "glorot_uniform",
    "bias_initializer": keras.initializers.RandomNormal(0.0, 0.5, seed=5),
    "kernel_regularizer": "l2",
    "recurrent_regularizer": "l1",
    "bias_regularizer": keras.regularizers.L2(0.1),
    "kernel_constraint": "max_norm",
    "recurrent_constraint": "unit_norm",
    "bias_constraint": "non_neg",
}
GATED = {**ARGUMENTS, "recurrent_activation": "hard_sigmoid"}
CONTRACT = {
    SimpleRNNBatchEnsemble: {**ARGUMENTS, "dropout": 0.25, "seed": 1},
    GRUBatchEnsemble: {
        **GATED,
        "reset_after": False,
        "use_bias": False,
        "dropout": 0.25,
        "recurrent_dropout": 0.25,
        "seed": 1,
    },
    LSTMBatchEnsemble: {
        **GATED,
        "unit_forget_bias": False,
        "recurrent_dropout": 0.25,
        "seed": 1,
    },
}
LOOPS = {
    SimpleRNNBatchEnsemble: {"go_backwards": True, "return_sequences": True},
    GRUBatchEnsemble: {"zero_output_for_mask": True},
    LSTMBatchEnsemble: {"return_state": True},
}
KINDS = {
    "simple": (SimpleRNNBatchEnsemble, keras.layers.SimpleRNN, {}),
    "gru": (GRUBatchEnsemble, keras.layers.GRU, {}),
    "gru_before": (GRUBatchEnsemble, keras.layers.GRU, {"reset_after": False}),
    "lstm": (LSTMBatchEnsemble, keras.layers.LSTM, {}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
TENSORFLOW = keras.backend.backend() == "tensorflow"
DTYPE = "float64" if TENSORFLOW else "float32"
CLOSE = {"rtol": 1e-9, "atol": 1e-9} if TENSORFLOW else {"rtol": 1e-4, "atol": 1e-5}
M, B, T, IN, H = 3, 2, 3, 2, 3
rng = np.random.default_rng(0)
X = rng.normal(size=(M * B, T, IN)).astype(DTYPE)
MASK = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
MASK = ops.convert_to_tensor(MASK.astype(bool))


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def made(kind, **kwargs):
    """A built layer with random weights, always the same."""
    rng = np.random.default_rng(1)
    layer, _, own = KINDS[kind]
    layer = layer(H, **{"ensemble_size": M, "dtype": DTYPE, **own, **kwargs})
    layer.build(X.shape)
    layer.set_weights([rng.normal(size=w.shape) for w in layer.weights])
    return layer


def weights_of(layer):
    return {v.name: ops.convert_to_numpy(v) for v in layer.trainable_variables}


def member_weights(weights, m):
    """W ∘ (sum_k r sᵀ), U ∘ (sum_k r' s'ᵀ) and b of member m."""
    found = []
    for prefix in ("", "recurrent_"):
        r, s = (weights[f"{prefix}{name}"] for name in ("alpha", "gamma"))
        r, s = (ops.reshape(w, (-1, *w.shape[-2:]))[:, m] for w in (r, s))
        found.append(weights[f"{prefix}kernel"] * ops.einsum("ki,ko->io", r, s))
    return [*found, weights["bias"][m]] if "bias" in weights else found


def plain(kind, **kwargs):
    _, layer, own = KINDS[kind]
    layer = layer(H, dtype=DTYPE, **own, **kwargs)
    layer.use_cudnn = False
    layer.build((B, *X.shape[1:]))
    return layer


def explicit(layer, weights, x, **call):
    """What a plain layer gives with each member's weights, one after the other."""
    others = [v.value for v in layer.non_trainable_variables]
    members, outputs = weights["alpha"].shape[-2], []
    rows = x.shape[0] // members
    for m in range(members):
        own = slice(m * rows, (m + 1) * rows)
        call_m = keras.tree.map_structure(lambda t, own=own: t[own], call)
        y, _ = layer.stateless_call(
            member_weights(weights, m), others, x[own], **call_m
        )
        outputs.append(keras.tree.flatten(y))
    return [ops.concatenate(parts) for parts in zip(*outputs, strict=True)]


def pytest_generate_tests(metafunc):
    if metafunc.function is test_contract:
        cases = itertools.product(CONTRACT, [True, False])
        if not metafunc.config.option.all:
            cases = zip(CONTRACT, [False, True, True], strict=True)
        metafunc.parametrize("layer, unroll", cases)


@pytest.mark.slow
def test_contract(layer, unroll):
    kwargs = {**CONTRACT[layer], **LOOPS[layer], "unroll": unroll}
    check_layer(layer, kwargs, (4, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("layer", CELLS)
def test_contract_of_cells(layer):
    check_cell(CELLS[layer], CONTRACT[layer], (4, 2, 2))


@pytest.mark.parametrize("layer", CELLS)
def test_configs_hold_what_the_contract_does_not_give(layer):
    kwargs = {"units": 2, "activity_regularizer": "l2", "stateful": True}
    check_config(layer(**kwargs), kwargs, lambda given: layer(**given))


@each_kind
@pytest.mark.parametrize(
    "loop",
    [
        {"rank": 2, "return_sequences": True, "return_state": True},
        {"go_backwards": True, "unroll": True, "zero_output_for_mask": True},
        {"use_bias": False, "return_sequences": True, "unroll": True},
    ],
    ids=lambda loop: next(iter(loop)),
)
def test_equals_plain_layers_with_explicit_kernels(kind, loop):
    """Outputs, and the gradients of all weights."""
    of_plain = {n: v for n, v in loop.items() if n != "rank"}
    layer, other = made(kind, **loop), plain(kind, **of_plain)
    call = {"mask": MASK} if "use_bias" not in loop else {}
    if "return_state" in loop:
        states = [rng.normal(size=(M * B, H)).astype(DTYPE)] * (1 + (kind == "lstm"))
        call["initial_state"] = [ops.convert_to_tensor(s) for s in states]
    weights = weights_of(layer)
    seeds = [v.value for v in layer.non_trainable_variables]

    def ours(x, *values):
        y, _ = layer.stateless_call(values, seeds, x, **call)
        return keras.tree.flatten(y)

    def theirs(x, *values):
        named = dict(zip(weights, values, strict=True))
        return explicit(other, named, x, **call)

    found, expected = ours(X, *weights.values()), theirs(X, *weights.values())
    scales = []
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(numpy(one), numpy(two), **CLOSE)
        scales.append(rng.normal(size=one.shape).astype(DTYPE))

    def loss(function):
        def scaled(*values):
            outputs = function(*values)
            return sum(ops.sum(y * s) for y, s in zip(outputs, scales, strict=True))

        return scaled

    found, expected = (gradients(loss(f), X, *weights.values()) for f in (ours, theirs))
    for name, one, two in zip(("x", *weights), found, expected, strict=True):
        np.testing.assert_allclose(one, two, **CLOSE, err_msg=name)
        assert two.any(), name


@each_kind
def test_ones_are_the_plain_layer(kind):
    layer, _, own = KINDS[kind]
    layer = layer(H, ensemble_size=M, dtype=DTYPE, **own)
    layer.build(X.shape)
    other = plain(kind)
    layer.kernel.assign(other.cell.kernel)
    layer.recurrent_kernel.assign(other.cell.recurrent_kernel)
    np.testing.assert_allclose(numpy(layer(X)), numpy(other(X)), **CLOSE)


@each_kind
def test_members_are_isolated(kind):
    layer = made(kind, rank=2, return_sequences=True, unroll=True)
    before = numpy(layer(X)).reshape(M, -1)

    def require_change_of(m, x=X):
        changed = numpy(layer(x)).reshape(M, -1) != before
        np.testing.assert_array_equal(changed.any(1), np.arange(M) == m)

    for m in range(M):
        x = X.copy()
        x[m * B : (m + 1) * B] += 1
        require_change_of(m, x)
        for weight in layer.cell.trainable_weights[:5]:
            old = ops.convert_to_numpy(weight)
            new = old.copy()
            # Members are the first axis of biases, the last but one of the others.
            np.moveaxis(new, 0 if weight.name == "bias" else -2, 0)[m] += 1
            weight.assign(new)
            require_change_of(m)
            weight.assign(old)


@each_kind
def test_gradients_are_isolated(kind):
    layer, m = made(kind, rank=2, unroll=True), 1
    weights = weights_of(layer)
    seeds = [v.value for v in layer.non_trainable_variables]

    def loss(x, *values):
        y, _ = layer.stateless_call(values, seeds, x)
        return ops.sum(ops.square(y[m * B : (m + 1) * B]))

    dx, *found = gradients(loss, X, *weights.values())
    own = np.arange(M) == m
    np.testing.assert_array_equal((dx != 0).reshape(M, -1).any(1), own)
    for name, gradient in zip(weights, found, strict=True):
        if name.endswith("kernel"):  # W and U learn from every member.
            assert (gradient != 0).all()
        else:
            moved = np.moveaxis(gradient != 0, 0 if name == "bias" else -2, 0)
            np.testing.assert_array_equal(moved.reshape(M, -1).any(1), own)


@each_kind
def test_rank_one_is_rank_k_with_zeros(kind):
    one, three = made(kind, unroll=True), made(kind, rank=3, unroll=True)
    for name in ("kernel", "recurrent_kernel", "bias"):
        getattr(three, name).assign(getattr(one, name))
    for prefix in ("", "recurrent_"):
        for name, others in ((f"{prefix}alpha", 0), (f"{prefix}gamma", 1)):
            own = ops.convert_to_numpy(getattr(one, name))
            others = others * rng.normal(size=(2, *own.shape))
            getattr(three, name).assign(np.concatenate([own[None], others]))
    np.testing.assert_allclose(numpy(three(X)), numpy(one(X)), **CLOSE)


def test_one_member():
    layer = made("lstm", ensemble_size=1)
    x = X[:5]
    (expected,) = explicit(plain("lstm"), weights_of(layer), x)
    np.testing.assert_allclose(numpy(layer(x)), numpy(expected), **CLOSE)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    "kind, gates, biases",
    [("simple", 1, 1), ("gru", 3, 2), ("gru_before", 3, 1), ("lstm", 4, 1)],
)
def test_parameter_count(kind, gates, biases, rank):
    layer, width = made(kind, rank=rank), gates * H
    fast = M * (IN + H + 2 * width)
    expected = (IN + H) * width + rank * fast + M * biases * width
    assert layer.count_params() == expected


def test_weights_and_their_initial_values():
    constants = {
        "kernel": 1.0,
        "recurrent": 2.0,
        "bias": 3.0,
        "alpha": 4.0,
        "gamma": 5.0,
        "recurrent_alpha": 6.0,
        "recurrent_gamma": 7.0,
    }
    initializers = {
        f"{name}_initializer": keras.initializers.Constant(value)
        for name, value in constants.items()
    }
    layer = LSTMBatchEnsemble(H, ensemble_size=M, **initializers)
    layer.build(X.shape)
    forget = np.repeat([0, 1, 0, 0], H)
    expected = {
        "kernel": np.full((IN, 4 * H), 1),
        "recurrent_kernel": np.full((H, 4 * H), 2),
        "bias": np.tile(3 + forget, (M, 1)),
        "alpha": np.full((M, IN), 4),
        "gamma": np.full((M, 4 * H), 5),
        "recurrent_alpha": np.full((M, H), 6),
        "recurrent_gamma": np.full((M, 4 * H), 7),
    }
    assert {weight.name for weight in layer.weights} == set(expected)
    for name, value in expected.items():
        found = numpy(getattr(layer, name))
        np.testing.assert_array_equal(found, value.astype("float64"), strict=True)
    layer = GRUBatchEnsemble(H, rank=2, ensemble_size=M)
    layer.build(X.shape)
    for name, shape in (
        ("alpha", (2, M, IN)),
        ("gamma", (2, M, 3 * H)),
        ("recurrent_alpha", (2, M, H)),
        ("recurrent_gamma", (2, M, 3 * H)),
    ):
        np.testing.assert_array_equal(numpy(getattr(layer, name)), np.ones(shape))
    np.testing.assert_array_equal(numpy(layer.bias), np.zeros((M, 2, 3 * H)))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_stateful_layer_goes_on_where_it_was(kind):
    layer = made(kind, stateful=True, unroll=True)
    (expected,) = explicit(
        plain(kind, unroll=True), weights_of(layer), np.concatenate([X, -X], 1)
    )
    layer(X)
    np.testing.assert_allclose(numpy(layer(-X)), numpy(expected), **CLOSE)
    layer.reset_state()
    (expected,) = explicit(plain(kind, unroll=True), weights_of(layer), X)
    np.testing.assert_allclose(numpy(layer(X)), numpy(expected), **CLOSE)


def test_bidirectional():
    loop = {"return_sequences": True, "unroll": True}
    both = keras.layers.Bidirectional(made("gru", **loop), None, dtype=DTYPE)
    both.build(X.shape)
    both.set_weights([rng.normal(size=w.shape) for w in both.weights])
    found = both(X, mask=MASK)
    for layer, y in zip((both.forward_layer, both.backward_layer), found, strict=True):
        backwards = layer.go_backwards
        other = plain("gru", **loop, go_backwards=backwards, zero_output_for_mask=True)
        (expected,) = explicit(other, weights_of(layer), X, mask=MASK)
        expected = numpy(expected)
        expected = expected[:, ::-1] if backwards else expected
        np.testing.assert_allclose(numpy(y), expected, **CLOSE)


@each_kind
def test_cells_alone_and_in_keras_rnn_are_the_layer(kind):
    layer = made(kind, rank=2, return_sequences=True, return_state=True, unroll=True)
    expected, *last = layer(X)
    cell = type(layer.cell).from_config(layer.cell.get_config())
    states, outputs = cell.get_initial_state(M * B), []
    cell.build((M * B, IN))
    cell.set_weights(layer.get_weights())
    for t in range(T):
        y, states = cell(X[:, t], states)
        outputs.append(numpy(y))
    np.testing.assert_allclose(np.stack(outputs, 1), numpy(expected), **CLOSE)
    for one, other in zip(states, last, strict=True):
        np.testing.assert_allclose(numpy(one), numpy(other), **CLOSE)
    around = keras.layers.RNN(cell, return_sequences=True, dtype=DTYPE)
    np.testing.assert_allclose(numpy(around(X)), numpy(expected), **CLOSE)
    assert not _HELD.sequences


def test_a_stack_of_cells_is_one_layer_after_the_other():
    loop = {"return_sequences": True, "unroll": True}
    layers = [made("gru", **loop), made("lstm", **loop)]
    layers[1] = LSTMBatchEnsemble.from_config(layers[1].get_config())
    expected = layers[1](layers[0](X))
    cells = [type(c).from_config(c.get_config()) for c in (x.cell for x in layers)]
    stack = keras.layers.StackedRNNCells(cells, dtype=DTYPE)
    stack = keras.layers.RNN(stack, dtype=DTYPE, **loop)
    stack.build(X.shape)
    stack.set_weights([w for x in layers for w in x.get_weights()])
    np.testing.assert_allclose(numpy(stack(X)), numpy(expected), **CLOSE)


def test_dropped_units_are_each_rows_and_the_same_at_all_steps():
    options = {
        "kernel_initializer": "identity",
        "use_bias": False,
        "ensemble_size": 2,
        "return_sequences": True,
        "unroll": True,
        "seed": 0,
    }
    x = np.ones((8, T, 64), "float32")
    layer = SimpleRNNBatchEnsemble(
        64, None, recurrent_initializer="zeros", dropout=0.25, **options
    )
    y = numpy(layer(x, training=True))
    np.testing.assert_array_equal(y, y[:, :1].repeat(T, 1))
    np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
    assert abs((y == 0).mean() - 0.25) < 0.07  # 4 standard deviations of 512 draws
    assert len(np.unique(y[:, 0], axis=0)) == 8
    assert (numpy(layer(x, training=True)) != y).any()
    np.testing.assert_array_equal(numpy(layer(x)), x)
    # In Keras's layer too.
    cell = SimpleRNNCellBatchEnsemble.from_config(layer.cell.get_config())
    around = keras.layers.RNN(cell, return_sequences=True, unroll=True)
    np.testing.assert_array_equal(numpy(around(x, training=True)) != 0, y != 0)
    # Of the state, whose first steps are h_1 = x, h_2 = x + m ∘ h_1.
    layer = SimpleRNNBatchEnsemble(
        64, None, recurrent_initializer="identity", recurrent_dropout=0.5, **options
    )
    y = numpy(layer(x, training=True))
    np.testing.assert_allclose(np.unique(y[:, -1]), [1, 1 + 2 + 4], rtol=1e-6)
    assert abs((y[:, -1] == 1).mean() - 0.5) < 0.09
    np.testing.assert_array_equal(numpy(layer(x))[:, -1], T)


def test_both_layers_of_bidirectional_drop_for_themselves():
    layer = SimpleRNNBatchEnsemble(
        8, None, kernel_initializer="ones", ensemble_size=1, dropout=0.5, seed=1
    )
    both = keras.layers.Bidirectional(layer, merge_mode=None)
    one, other = both(np.ones((4, 1, 8), "float32"), training=True)
    assert (numpy(one) != numpy(other)).any()


def test_the_shared_kernels_can_be_frozen_by_themselves():
    layer = made("gru")
    layer.shared.trainable = False
    names = {weight.name for weight in layer.trainable_weights}
    fast = {"alpha", "gamma", "recurrent_alpha", "recurrent_gamma", "bias"}
    assert names == fast


def test_what_an_exception_leaves_in_a_cell_is_not_used():
    fail = [True]

    def activation(x):
        if fail[0]:
            raise RuntimeError("stop")
        return x

    cell = SimpleRNNCellBatchEnsemble(H, activation, ensemble_size=M)
    layer = keras.layers.RNN(cell, unroll=True)
    model = keras.Sequential([keras.Input((T, IN)), layer])
    model.compile("sgd", "mse", jit_compile=False)
    states = cell.get_initial_state(M * B)
    x = X.astype("float32")
    # In the middle of a trace, and of a call whose weights change later.
    for run in (lambda: model.fit(x, x[:, 0, :H], verbose=0), lambda: layer(x)):
        fail[0] = True
        with pytest.raises(RuntimeError, match="stop"):
            run()
        fail[0] = False
        cell.set_weights([1 + w for w in cell.get_weights()])
        fresh = SimpleRNNCellBatchEnsemble(H, activation, ensemble_size=M)
        fresh.build((M * B, IN))
        fresh.set_weights(cell.get_weights())
        expected, _ = fresh(x[:, 0], states)
        found, _ = cell(x[:, 0], states)
        np.testing.assert_array_equal(numpy(found), numpy(expected))
        assert not _HELD.sequences


def test_rows_that_do_not_split():
    layer = made("lstm", unroll=True)
    message = f"ensemble_size={M}. Received: a batch of 7 rows"
    for x in (np.zeros((7, T, IN)), keras.Input((T, IN), batch_size=7)):
        with pytest.raises(ValueError, match=message):
            layer(x)
    with pytest.raises(ValueError, match=message):
        layer.cell(np.zeros((7, IN)), layer.cell.get_initial_state(7))
    assert not _HELD.sequences


@pytest.mark.tensorflow
def test_rows_that_do_not_split_in_predict():
    import tensorflow as tf

    model = keras.Sequential([keras.Input((T, IN)), made("simple")])
    # Two batch sizes make TensorFlow trace one function for all.
    for rows in (M, 2 * M):
        model.predict(np.zeros((rows, T, IN)), verbose=0)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"ensemble_size={M}"):
        model.predict(np.zeros((7, T, IN)), verbose=0)


@pytest.mark.parametrize(
    "layer, kwargs",
    [
        (LSTMBatchEnsemble, {"units": 0}),
        (GRUBatchEnsemble, {"rank": 1.5}),
        (SimpleRNNBatchEnsemble, {"ensemble_size": 0}),
        (LSTMBatchEnsemble, {"dropout": 1.0}),
        (GRUBatchEnsemble, {"recurrent_dropout": -0.1}),
        (GRUCellBatchEnsemble, {"activity_regularizer": "l2"}),
    ],
)
def test_refuses(layer, kwargs):
    ((name, _),) = kwargs.items()
    with pytest.raises(ValueError, match=f"Received: {name}="):
        layer(**{"units": 3, **kwargs})


def test_bad_inputs():
    with pytest.raises(ValueError, match="ndim"):
        LSTMBatchEnsemble(3)(np.zeros((4, 2)))
