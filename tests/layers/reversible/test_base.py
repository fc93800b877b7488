import re
from functools import partial

import keras
import numpy as np
import pytest
from keras import ops

from harness import check_cell, check_layer
from harness.backends import compiled, gradients
from harness.configs import check_config
from kzoo.layers import RevGRU, RevGRUCell, RevLSTM, RevLSTMCell
from kzoo.layers.ops.gradient import jacobian_products
from kzoo.layers.ops.loops import compiled_once, vjp
from kzoo.layers.reversible.loop import Loop

ARGUMENTS = {
    "units": 4,
    "activation": "softsign",
    "recurrent_activation": "hard_sigmoid",
    "kernel_initializer": "he_normal",
    "recurrent_initializer": "glorot_uniform",
    "bias_initializer": keras.initializers.RandomNormal(0.0, 0.5, seed=5),
    "kernel_regularizer": "l2",
    "recurrent_regularizer": "l1",
    "bias_regularizer": keras.regularizers.L2(0.1),
    "kernel_constraint": "max_norm",
    "recurrent_constraint": "unit_norm",
    "bias_constraint": "non_neg",
    "seed": 1,
}
GRU = {**ARGUMENTS, "max_forget_bits": 3, "dropout": 0.25}
LSTM = {
    **ARGUMENTS,
    "max_forget_bits": 2,
    "state_bits": 20,
    "gate_bits": 9,
    "unit_forget_bias": True,
    "recurrent_dropout": 0.25,
}
each_layer = pytest.mark.parametrize("layer", [RevGRU, RevLSTM])
TENSORFLOW = keras.backend.backend() == "tensorflow"
DTYPE = "float64" if TENSORFLOW else "float32"
B, T, IN, H = 3, 5, 2, 6
rng = np.random.default_rng(0)
X = rng.normal(size=(B, T, IN)).astype(DTYPE)
MASK = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [1, 0, 1, 1, 0]], bool)


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def made(layer, units=H, features=IN, **kwargs):
    """A built layer with random weights, always the same."""
    rng = np.random.default_rng(1)
    layer = layer(units, **{"dtype": DTYPE, **kwargs})
    layer.build((B, T, features))
    layer.set_weights([rng.normal(size=w.shape) for w in layer.weights])
    return layer


def first_states(layer):
    rng = np.random.default_rng(2)
    shape = (len(layer.state_size), B, H)
    return [ops.convert_to_tensor(s) for s in rng.normal(size=shape).astype(DTYPE) / 2]


def stateless(layer, seeds=None, **call):
    """A layer as a function of inputs, first states and weights."""
    others = (
        [v.value for v in layer.non_trainable_variables] if seeds is None else seeds
    )
    count = len(layer.state_size)

    def function(x, *values):
        states, weights = list(values[:count]), values[count:]
        found, _ = layer.stateless_call(
            weights, others, x, initial_state=states, **call
        )
        return keras.tree.flatten(found)

    return function


def given(layer):
    return [X, *first_states(layer), *(v.value for v in layer.trainable_variables)]


def scaled(function, count):
    """The sum of all outputs, each with weights of its own."""
    rng = np.random.default_rng(3)
    scales = [ops.convert_to_tensor(rng.normal(size=100)) for _ in range(count)]

    def loss(*values):
        total = 0
        for y, s in zip(function(*values), scales, strict=True):
            y = ops.reshape(ops.cast(y, DTYPE), (-1,))
            total = total + ops.sum(y * ops.cast(s[: y.shape[0]], DTYPE))
        return total

    return loss


# --- the equations ----------------------------------------------------------------


def equations(layer, x, *values):
    """The steps as the papers write them, in floats that nothing rounds."""
    cell, count, m = layer.cell, len(layer.state_size), H // 2
    k, sigmoid, tanh = cell.fixed.forget_bits, ops.sigmoid, ops.tanh
    states, (w, u, *b) = values[:count], values[count:]
    b = b[0] if b else ops.zeros_like(w[0])
    h, c = ([[s[:, :m], s[:, m:]] for s in states] + [None])[:2]
    gates, outputs = w.shape[1] // H, []

    def limited(s):
        return 2.0**-k + (1 - 2.0**-k) * s

    def part(half, first, last):
        of = slice((half * gates + first) * m, (half * gates + last) * m)
        return w[:, of], u[:, of], b[of]

    for t in range(T):
        for half in (0, 1):
            other = h[1 - half]
            if c is None:
                w1, u1, b1 = part(half, 0, 2)
                z, r = ops.split(sigmoid(x[:, t] @ w1 + other @ u1 + b1), 2, -1)
                w2, u2, b2 = part(half, 2, 3)
                g = tanh(x[:, t] @ w2 + (r * other) @ u2 + b2)
                if k:
                    z = limited(z)
                    h[half] = z * h[half] + (1 - z) * g
                else:
                    h[half] = h[half] + (1 - z) * g
                continue
            w1, u1, b1 = part(half, 0, gates)
            a = ops.split(x[:, t] @ w1 + other @ u1 + b1, gates, -1)
            if k:
                i, g, f, o, p = a
                f, p = limited(sigmoid(f)), limited(sigmoid(p))
            else:
                (i, g, o), f, p = a, 1.0, 1.0
            c[half] = f * c[half] + sigmoid(i) * tanh(g)
            h[half] = p * h[half] + sigmoid(o) * tanh(c[half])
        outputs.append(ops.concatenate(h, -1))
    last = [ops.concatenate(s, -1) for s in ([h, c] if c else [h])]
    return [ops.stack(outputs, 1), *last]


@each_layer
@pytest.mark.parametrize("bits", [0, 1, None])
def test_equations(layer, bits):
    """Outputs and gradients, as far as gates of 14 bits round them."""
    loop = {"return_sequences": True, "return_state": True, "use_bias": bits != 0}
    layer = made(layer, max_forget_bits=bits, gate_bits=14, **loop)

    def ours(*values):
        return stateless(layer)(*values)

    def theirs(x, *values):
        return equations(layer, x, *values)

    values = given(layer)
    found, expected = ours(*values), theirs(*values)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(numpy(one), numpy(two), atol=3e-4)
    count = len(found)
    found, expected = (gradients(scaled(f, count), *values) for f in (ours, theirs))
    for one, two in zip(found, expected, strict=True):
        cosine = (one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum())
        assert cosine > np.cos(np.radians(0.2))
        np.testing.assert_allclose(one, two, atol=5e-3 * np.abs(two).max())


# --- the way back -----------------------------------------------------------------


DROPPED = {"go_backwards": True, "recurrent_dropout": 0.5, "dropout": 0.5}


@pytest.mark.parametrize(
    "layer, bits, loop",
    [
        (RevGRU, 2, {"return_sequences": True, "return_state": True}),
        (RevGRU, None, DROPPED),
        (RevLSTM, 5, DROPPED),
        (RevLSTM, 0, {"return_sequences": True}),
    ],
)
def test_gradients_are_those_of_ordinary_backpropagation(layer, bits, loop):
    """Through the same quantised cell in Keras's loop, straight through rounding."""
    layer = made(layer, max_forget_bits=bits, seed=1, **loop)
    of_loop = {n: v for n, v in loop.items() if "dropout" not in n}
    around = keras.layers.RNN(layer.cell, dtype=DTYPE, unroll=True, **of_loop)
    around.build(X.shape)
    seeds = [ops.convert_to_tensor(np.uint32([3, 5]))]
    call = {"mask": ops.convert_to_tensor(MASK)} if bits != 2 else {}
    values = given(layer)
    if bits == 0:  # Keras's first output is 0 where the first step is masked.
        call["mask"] = ops.logical_or(call["mask"], np.arange(T) == 0)
    outputs, found = [], []
    for one in (layer, around):
        function = stateless(one, seeds, training=True, **call)
        if one is layer:
            function = compiled(function)
        outputs.append(function(*values))
        loss = scaled(function, len(outputs[-1]))
        found.append(gradients(loss, *values))
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), rtol=0, atol=2e-6)
    for a, b in zip(*found, strict=True):
        assert b.any()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def long_loss(layer, x):
    """A loss of weights, over steps some of which are masked."""
    mask = ops.convert_to_tensor(x[..., 0] < 1.5)
    others = [v.value for v in layer.non_trainable_variables]

    def loss(*weights):
        y, _ = layer.stateless_call(weights, others, x, mask=mask, training=True)
        return ops.sum(ops.square(y))

    return loss


@each_layer
@pytest.mark.parametrize("jit, steps", [(True, 10_000), (False, 500)])
def test_long_sequences_end_where_they_began(layer, jit, steps):
    """Had any bit been lost, gradients were NaN."""
    layer = made(
        layer, 6, 1, max_forget_bits=3, dtype="float32", return_sequences=not jit
    )
    # Smaller weights, with which gradients do not overflow in so many steps.
    layer.set_weights([0.3 * w for w in layer.get_weights()])
    x = np.random.default_rng(4).normal(size=(2, steps, 1)).astype("float32")
    loss = long_loss(layer, x)
    if jit:
        loss = compiled(loss)
    elif TENSORFLOW:
        import tensorflow as tf

        loss = tf.function(loss)
    for gradient in gradients(loss, *(v.value for v in layer.trainable_variables)):
        assert np.isfinite(gradient).all() and gradient.any()


def loop_of(layer, x=X):
    cell = layer.cell
    weights = cell._weights_of_couplings()
    parts = cell.parts_of(first_states(layer))
    tensors = {"x": ops.convert_to_tensor(x), "parts": parts, "weights": weights}
    return Loop(cell, tensors, go_backwards=False, output_units=0)


def test_a_step_that_is_not_undone_is_noticed():
    loop = loop_of(made(RevGRU, max_forget_bits=3))
    upstream = [ops.ones_like(n, dtype=DTYPE) for n in loop.first]
    for one, is_right in ((0, np.isfinite), (1, np.isnan)):
        loop.undo = lambda n, word, increment, z, one=one: Loop.undo(
            loop, n, word, increment + one, z
        )
        found = keras.tree.flatten(loop.backwards(upstream))
        assert all(is_right(numpy(d)).all() for d in found)


def derivative(function, x):
    """The gradient of a scalar function as a tensor."""
    outputs, pull = vjp(lambda a: (function(a),), x)
    return pull((ops.ones_like(*outputs),))[0]


def optimized(function, x):
    """The program that XLA makes of a function."""
    if TENSORFLOW:
        x = ops.convert_to_tensor(x)
        return compiled(function).experimental_get_compiler_ir(x)("optimized_hlo")
    return compiled(function).lower(x).compile().as_text()


@pytest.mark.parametrize("at", [0, 1, 2], ids=["inputs", "state", "weight"])
def test_no_compiler_knows_how_often_a_gradient_turns(at):
    """By whatever it is, with all else constant; of the way there alone XLA knows."""
    layer = made(RevGRU, max_forget_bits=3)
    values = given(layer)

    def loss(value):
        (y,) = stateless(layer)(*values[:at], value, *values[at + 1 :])
        return ops.sum(ops.square(y))

    program = optimized(partial(derivative, loss), values[at])
    assert re.findall(r"known_trip_count\W+n\W+(\d+)", program) == [str(T)]


@pytest.mark.tensorflow
def test_a_persistent_tape_records_no_steps():
    """XLA refuses to keep those of the loop that forwards runs."""
    import tensorflow as tf

    layer = made(RevGRU, max_forget_bits=3, return_sequences=True)
    values = [layer.cell.kernel.value, layer.cell.recurrent_kernel.value]

    @tf.function(jit_compile=True)
    def gradients_by(persistent):
        with tf.GradientTape(persistent=persistent) as tape:
            loss = tf.reduce_sum(layer(X) ** 2)
        return tape.gradient(loss, values)

    for one, other in zip(*map(gradients_by, (True, False)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@each_layer
def test_second_derivatives_are_lost_and_those_of_cells_are_right(layer):
    """The way there and back is integers', which would silently have none."""
    layer = made(layer, gate_bits=15)
    x, *others = map(ops.convert_to_tensor, given(layer))
    u = np.random.default_rng(5).normal(size=X.shape).astype(DTYPE)

    def second(last):
        def slope(x):
            return derivative(lambda x: ops.sum(ops.square(last(x, *others))), x)

        return numpy(derivative(lambda x: ops.sum(slope(x) * u), x))

    def of_layer(*values):
        return stateless(layer)(*values)[0]

    if TENSORFLOW:
        assert np.isnan(second(of_layer)).all()
    else:
        with pytest.raises(ValueError, match="does not work for lax.while_loop"):
            second(of_layer)
    by_steps = keras.layers.RNN(layer.cell, dtype=DTYPE)
    by_steps.build(X.shape)
    found = second(lambda *values: stateless(by_steps)(*values)[0])
    expected = second(lambda *values: equations(layer, *values)[1])
    np.testing.assert_allclose(found, expected, atol=1e-2 * np.abs(expected).max())


def test_gradients_are_the_same_where_others_are_taken_inside():
    layer = made(RevGRU, max_forget_bits=3)
    x, *others = map(ops.convert_to_tensor, given(layer))

    def loss(x):
        return ops.sum(ops.square(stateless(layer)(x, *others)[0]))

    def loss_and_slope(x):
        (value,), pull = vjp(lambda x: (loss(x),), x)
        pull((ops.ones_like(value),))
        return value

    found, expected = (derivative(f, x) for f in (loss_and_slope, loss))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    if TENSORFLOW:  # By what a gradient is linear in, it can be differentiated.
        around = keras.layers.RNN(layer.cell, dtype=DTYPE)
        given_both = [x], [[ops.ones_like(x)]]
        found, expected = (jacobian_products(f, *given_both) for f in (layer, around))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.tensorflow
@each_layer
def test_gradients_have_the_dtype_of_what_they_are_by(layer):
    """TensorFlow takes no other back to what makes half-precision weights."""
    found = []
    for dtype in ("float16", "float32"):
        one = made(layer, dtype=dtype, recurrent_dropout=0.5, max_forget_bits=3)
        kernel, *others = (v.value for v in one.trainable_variables)
        seeds = [ops.convert_to_tensor(np.uint32([3, 5]))]

        def loss(kernel, one=one, others=others, seeds=seeds):
            weights = [kernel / 0.5, *others]
            return ops.sum(
                ops.square(one.stateless_call(weights, seeds, X, training=True)[0])
            )

        found.append(derivative(loss, kernel))
        assert found[-1].dtype == dtype
    half, single = map(numpy, found)
    np.testing.assert_allclose(half, single, atol=0.02 * np.abs(single).max())


def turned(loop, back, steps, state, words):
    """The state and the words after steps there or back."""
    turn = compiled_once(loop.there_or_back)
    for t in steps:
        state, words, _ = turn(back, t, state, words)
    return state, words


@each_layer
def test_what_is_kept(layer):
    """A word of 32 bits for 10 steps of 3 bits, used up on the way back."""
    for bits, steps in ((None, 3), (1, 32), (5, 6), (3, 10)):
        one = made(layer, max_forget_bits=bits)
        assert one.cell.fixed.steps_per_word == steps
    loop = loop_of(one, np.tile(X, (1, 5, 1))[:, :steps])
    empty = [ops.zeros_like(n, dtype="uint32") for n in loop.first]
    state, words = turned(loop, False, range(steps), loop.first, empty)
    assert max(numpy(w).max() for w in words) >= 1 << 27  # Of the first step's bits.
    state, words = turned(loop, True, reversed(range(steps)), state, words)
    for n, expected in zip([*state, *words], [*loop.first, *empty], strict=True):
        np.testing.assert_array_equal(numpy(n), numpy(expected))
    # Gates of 1 forget nothing.
    one.cell.bias.assign(np.full(one.cell.bias.shape, 60.0))
    loop = loop_of(one)
    _, words = turned(loop, False, range(4), loop.first, empty)
    assert not any(numpy(w).any() for w in words)


@pytest.mark.jax
@each_layer
def test_memory_grows_by_the_bits_that_may_be_forgotten(layer):
    """By 4 bytes in 10 steps of 3 bits for each number of the state."""
    import jax

    rows, units, features, steps = 8, 64, 2, (320, 640)
    layer = made(layer, units, features, max_forget_bits=3, dtype="float32")
    others = [v.value for v in layer.non_trainable_variables]

    def loss(weights, x):
        y, _ = layer.stateless_call(weights, others, x, training=True)
        return ops.sum(ops.square(y))

    def needed(steps):
        weights = [v.value for v in layer.trainable_variables]
        x = jax.ShapeDtypeStruct((rows, steps, features), "float32")
        step = jax.jit(jax.grad(loss)).lower(weights, x).compile()
        return step.memory_analysis().temp_size_in_bytes

    few, many = map(needed, steps)
    grown = (steps[1] - steps[0]) * rows
    words = grown / 10 * units * len(layer.state_size) * 4
    assert words <= many - few <= words + grown * features * 4


@each_layer
@pytest.mark.parametrize("whole", [True, False])
def test_outputs_of_the_first_units(layer, whole):
    """4 of 6: all of h¹ and one of h²."""
    found = []
    for units in (None, 4):
        one = made(layer, return_sequences=whole, output_units=units, return_state=True)
        run = stateless(one)

        def loss(*values, run=run):
            y, *states = run(*values)
            return scaled(lambda: [y[..., :4], *states], 1 + len(states))()

        outputs = one(X, initial_state=first_states(one))
        shapes = one.compute_output_shape(X.shape)
        assert [tuple(y.shape) for y in outputs] == [tuple(s) for s in shapes]
        found.append([outputs[0][..., :4], *outputs[1:], *gradients(loss, *given(one))])
    assert outputs[0].shape[-1] == 4
    for expected, same in zip(*found, strict=True):
        np.testing.assert_allclose(numpy(same), numpy(expected), rtol=1e-6, atol=1e-6)


# --- what else a recurrent layer does ---------------------------------------------


@each_layer
def test_steps_and_rows_stand_for_themselves(layer):
    layer = made(layer, max_forget_bits=3, return_sequences=True, return_state=True)
    y, *last = layer(X, initial_state=first_states(layer), training=True)
    start, *middle = layer(X[:, :2], initial_state=first_states(layer), training=True)
    end, *states = layer(X[:, 2:], initial_state=middle)
    together = np.concatenate([numpy(start), numpy(end)], 1)
    np.testing.assert_allclose(together, numpy(y), rtol=0, atol=1e-6)
    for one, other in zip(states, last, strict=True):
        np.testing.assert_allclose(numpy(one), numpy(other), rtol=0, atol=1e-6)
    rows = [
        layer(X[i : i + 1], initial_state=[s[i : i + 1] for s in middle])[0]
        for i in range(B)
    ]
    expected = layer(X, initial_state=middle)[0]
    np.testing.assert_allclose(
        np.concatenate([numpy(row) for row in rows]), numpy(expected), rtol=0, atol=1e-6
    )


@each_layer
def test_masked_steps_are_as_none(layer):
    layer = made(layer, return_sequences=True, zero_output_for_mask=True)
    mask = ops.convert_to_tensor(MASK)
    y = numpy(layer(X, mask=mask, training=True))
    np.testing.assert_array_equal((y != 0).all(-1), MASK)
    for row, seen in enumerate(MASK):
        alone = numpy(layer(X[row : row + 1, seen]))
        np.testing.assert_allclose(y[row : row + 1, seen], alone, rtol=0, atol=1e-6)


def test_a_stateful_layer_goes_on_where_it_was():
    layer, other = made(RevGRU, stateful=True), made(RevGRU)
    layer(X)
    expected = numpy(other(np.concatenate([X, -X], 1)))
    np.testing.assert_allclose(numpy(layer(-X)), expected, rtol=0, atol=1e-6)
    layer.reset_state()
    np.testing.assert_allclose(numpy(layer(X)), numpy(other(X)), rtol=0, atol=1e-6)


def test_bidirectional():
    both = keras.layers.Bidirectional(made(RevLSTM, return_sequences=True), dtype=DTYPE)
    both.build(X.shape)
    one, other = both.forward_layer, both.backward_layer
    expected = [numpy(one(X)), numpy(other(X))[:, ::-1]]
    np.testing.assert_array_equal(numpy(both(X)), np.concatenate(expected, -1))
    assert other.go_backwards and not one.go_backwards


def test_forgetting_may_start_low():
    """Of the columns i, g, f, o, p the bias of f alone starts higher, if asked to."""
    for bits, asked, bias in (
        (3, True, [0, 0, 1, 0, 0] * 2),
        (3, False, np.zeros(10)),
        (0, True, np.zeros(6)),
    ):
        layer = RevLSTM(2, max_forget_bits=bits, unit_forget_bias=asked)
        layer.build((B, T, IN))
        np.testing.assert_array_equal(numpy(layer.cell.bias), bias)


@pytest.mark.parametrize(
    "layer, kwargs",
    [
        (RevGRU, {"units": 5}),
        (RevLSTM, {"units": 0}),
        (RevGRU, {"max_forget_bits": 11}),
        (RevLSTM, {"max_forget_bits": -1}),
        (RevGRU, {"state_bits": 31}),
        (RevLSTM, {"gate_bits": 16}),
        (RevGRU, {"dropout": 1.0}),
        (RevLSTM, {"unroll": True}),
        (RevGRU, {"output_units": 5}),
        (RevLSTM, {"output_units": 0}),
        (RevGRUCell, {"activity_regularizer": "l2"}),
    ],
)
def test_refuses(layer, kwargs):
    ((name, _),) = kwargs.items()
    with pytest.raises(ValueError, match=f"Received: {name}="):
        layer(**{"units": 4, **kwargs})


def test_refuses_output_units_that_are_set_later():
    layer = RevGRU(4)
    layer.output_units = 3
    assert tuple(layer(X).shape) == (B, 3) and layer.get_config()["output_units"] == 3
    for count in (0, 5, 1.5):
        with pytest.raises(ValueError, match=f"Received: output_units={count}"):
            layer.output_units = count
    assert layer.output_units == 3


# --- the contract -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer, kwargs",
    [
        (RevGRU, {**GRU, "return_sequences": True, "go_backwards": True}),
        (RevLSTM, {**LSTM, "return_state": True, "zero_output_for_mask": True}),
    ],
)
def test_contract(layer, kwargs):
    check_layer(layer, kwargs, (4, 3, 2))


@pytest.mark.slow
@pytest.mark.parametrize("cell, kwargs", [(RevGRUCell, GRU), (RevLSTMCell, LSTM)])
def test_contract_of_cells(cell, kwargs):
    check_cell(cell, kwargs, (4, 2, 2))


@each_layer
def test_configs_hold_what_the_contract_does_not_give(layer):
    kwargs = {
        "units": 2,
        "output_units": 1,
        "use_bias": False,
        "stateful": True,
        "max_forget_bits": 0,
    }
    check_config(layer(**kwargs), kwargs, lambda given: layer(**given))
