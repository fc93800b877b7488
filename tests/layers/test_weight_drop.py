"""Weight drop: the gradient under known masks, which calls drop, what is refused."""

import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from harness.backends import compiled, gradients
from kzoo.layers import RevGRU, RevLSTM, WeightDrop
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


def test_layers_around_layers_and_cells():
    both = keras.layers.Bidirectional(RevGRU(2, seed=1))
    stack = keras.layers.RNN([keras.layers.GRUCell(2), keras.layers.LSTMCell(3)])
    for layer in (both, stack):
        wrapped = WeightDrop(layer, 0.5, seed=0)
        assert tuple(wrapped(X, training=True).shape) == tuple(wrapped(X).shape)
        assert len(wrapped._kernels()) == 2


@pytest.mark.parametrize("rate", [-0.1, 1.0, "half"])
def test_refuses_what_is_no_rate(rate):
    with pytest.raises(ValueError, match="Received: rate="):
        WeightDrop(keras.layers.GRU(2), rate)


def test_refuses_layers_without_recurrent_kernels():
    with pytest.raises(ValueError, match="Received: layer="):
        WeightDrop(keras.layers.Dense(2)).build((B, T, IN))
    with pytest.raises(ValueError, match="Received: activity_regularizer="):
        WeightDrop(keras.layers.GRU(2, activity_regularizer="l2"))
    with pytest.raises(ValueError, match="Received: stateful="):
        WeightDrop(keras.layers.GRU(2, stateful=True))


@pytest.mark.slow
def test_contract():
    layer = keras.layers.GRU(3, return_sequences=True, seed=0)
    check_layer(WeightDrop, {"layer": layer, "rate": 0.25, "seed": 1}, (4, 3, 2))
