"""Weight drop: the gradient under known masks, which calls drop, what is refused."""

import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from harness.backends import compiled, gradients
from kzoo.layers import GRUFlipout, RevGRU, RevLSTM, WeightDrop
from kzoo.layers.ops.random import bernoulli

B, T, IN, H = 3, 4, 2, 6
X = np.random.default_rng(0).normal(size=(B, T, IN)).astype("float32")
SEED = np.uint32([7, 3])
KERAS = [keras.layers.GRU, keras.layers.LSTM, keras.layers.SimpleRNN]


def made(layer, **kwargs):
    wrapped = WeightDrop(layer(H, **kwargs), 0.25, seed=1)
    wrapped.build((B, T, IN))
    rng = np.random.default_rng(1)
    for v in wrapped.trainable_variables:
        v.assign(rng.normal(size=v.shape) / 2)
    return wrapped


def function(layer, variables, seeds, training):
    """A layer as a function of inputs and weights."""

    def loss(x, *weights):
        y, _ = layer.stateless_call(weights, seeds, x, training=training)
        return ops.sum(ops.square(y))

    return loss, [X, *(v.value for v in variables)]


@pytest.mark.slow
@pytest.mark.parametrize("layer", [*KERAS, RevGRU, RevLSTM])
def test_gradients_are_those_of_masked_weights(layer):
    """Dropped weights have none, and the others those of U / (1 - p)."""
    wrapped = made(layer)
    plain = wrapped.layer
    seeds = [
        ops.convert_to_tensor(SEED) if v is wrapped.seed_generator.state else v.value
        for v in wrapped.non_trainable_variables
    ]
    ours, values = function(wrapped, wrapped.trainable_variables, seeds, True)
    (at,) = (
        i
        for i, v in enumerate(plain.trainable_variables, 1)
        if v.name == "recurrent_kernel"
    )
    mask = ops.convert_to_numpy(bernoulli(values[at].shape, SEED, 0.75, "float32"))
    assert 0 < mask.mean() < 1
    others = [v.value for v in plain.non_trainable_variables]
    theirs, _ = function(plain, plain.trainable_variables, others, True)
    found = gradients(ours if layer in KERAS else compiled(ours), *values)
    values[at] = values[at] * mask / 0.75
    expected = gradients(theirs, *values)
    expected[at] = expected[at] * mask / 0.75
    for one, two in zip(found, expected, strict=True):
        assert two.any() and np.isfinite(one).all()
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5 * abs(two).max())


@pytest.mark.parametrize("layer", [keras.layers.GRU, RevGRU])
def test_inference_has_the_whole_weights_and_each_call_its_own_mask(layer):
    wrapped = made(layer)
    whole = ops.convert_to_numpy(wrapped(X))
    np.testing.assert_array_equal(whole, ops.convert_to_numpy(wrapped.layer(X)))
    one, two = (ops.convert_to_numpy(wrapped(X, training=True)) for _ in range(2))
    assert (one != whole).any() and (one != two).any()
    kernel = [v for v in wrapped.variables if v.name == "recurrent_kernel"]
    kernel[0].assign(np.zeros(kernel[0].shape))  # Nothing else is dropped.
    np.testing.assert_allclose(
        wrapped(X, training=True), ops.convert_to_numpy(wrapped(X)), atol=1e-6
    )


def test_all_steps_have_one_mask():
    """h_t = h_{t-1} U of a row: powers of one matrix."""
    wrapped = made(keras.layers.SimpleRNN, activation=None, return_sequences=True)
    eye = np.eye(H, dtype="float32")[:, None]
    start = ops.convert_to_tensor(eye[:, 0])
    x = np.zeros((H, 3, IN), "float32")
    for v in wrapped.trainable_variables:
        if v.name == "bias":
            v.assign(np.zeros(v.shape))
    y = ops.convert_to_numpy(wrapped(x, initial_state=start, training=True))
    u = y[:, 0]
    np.testing.assert_allclose(y[:, 1], u @ u, atol=1e-6)
    np.testing.assert_allclose(y[:, 2], u @ u @ u, atol=1e-6)
    assert (u == 0).any()


@pytest.mark.parametrize(
    "layer",
    [
        lambda: keras.layers.Bidirectional(RevGRU(H, seed=1)),
        lambda: keras.layers.RNN([keras.layers.GRUCell(H), keras.layers.LSTMCell(H)]),
    ],
    ids=["Bidirectional", "RNN"],
)
def test_each_kernel_inside_of_the_layer_is_dropped(layer):
    """The masks that gradients show, applied by hand, give what training gives."""
    wrapped = made(lambda units: layer())
    variables = wrapped.trainable_variables
    seeds = [v.value for v in wrapped.non_trainable_variables]
    loss, values = function(wrapped, variables, seeds, True)
    found = gradients(loss, *values)[1:]
    expected, _ = wrapped.stateless_call(values[1:], seeds, X, training=True)
    masks = []
    for v, gradient in zip(variables, found, strict=True):
        if v.name == "recurrent_kernel":
            masks.append(gradient != 0)
            v.assign(ops.convert_to_numpy(v) * masks[-1] / 0.75)
        else:
            assert gradient.any()
    assert len(masks) == 2
    assert all(0.65 < mask.mean() < 0.85 for mask in masks)
    assert (masks[0] != masks[1][:, : masks[0].shape[1]]).any()
    np.testing.assert_allclose(wrapped(X), ops.convert_to_numpy(expected), atol=1e-5)


def test_what_the_layer_draws_moves_its_seed_on_and_nothing_else():
    """Its own dropout has new masks in each call, as it has alone."""
    wrapped = made(RevGRU, dropout=0.5, seed=3)
    state = wrapped.layer.cell.seed_generator.state
    first = ops.convert_to_numpy(state)
    wrapped.layer(X, training=True)
    alone = ops.convert_to_numpy(state)
    assert (alone != first).any()
    state.assign(first)
    before = wrapped.layer.get_weights()
    wrapped(X, training=True)
    np.testing.assert_array_equal(ops.convert_to_numpy(state), alone)
    for weight, expected in zip(wrapped.layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_states_of_a_stateful_layer_are_carried():
    """Two calls with one mask are a call of twice the steps."""
    carried, whole = made(RevGRU, stateful=True), made(RevGRU)
    for part in (X, -X):
        carried.seed_generator.state.assign(SEED)
        found = ops.convert_to_numpy(carried(part, training=True))
    whole.seed_generator.state.assign(SEED)
    expected = ops.convert_to_numpy(whole(np.concatenate([X, -X], 1), training=True))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("rate", [-0.1, 1.0, "half"])
def test_refuses_what_is_no_rate(rate):
    with pytest.raises(ValueError, match="Received: rate="):
        WeightDrop(keras.layers.GRU(2), rate)


def test_refuses_layers_without_recurrent_kernels():
    with pytest.raises(ValueError, match="Received: layer="):
        WeightDrop(keras.layers.Dense(2)).build((B, T, IN))


def both(layer):
    return keras.layers.Bidirectional(layer, name="both")


@pytest.mark.parametrize("around", [lambda layer: layer, both], ids=["alone", "inside"])
def test_refuses_what_would_be_lost(around):
    with pytest.raises(ValueError, match="gru.*with activity_regularizer="):
        WeightDrop(around(keras.layers.GRU(2, activity_regularizer="l2")))
    with pytest.raises(ValueError, match="gru.*with stateful=True"):
        WeightDrop(around(keras.layers.GRU(2, stateful=True)))
    with pytest.raises(ValueError, match="Received: GRUCellFlipout"):
        WeightDrop(around(GRUFlipout(2)))


@pytest.mark.slow
def test_contract():
    layer = keras.layers.GRU(3, return_sequences=True, seed=0)
    check_layer(WeightDrop, {"layer": layer, "rate": 0.25, "seed": 1}, (4, 3, 2))
