import itertools

import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from kzoo.layers import (
    Conv1DFlipout,
    Conv1DLocalReparameterization,
    Conv1DReparameterization,
    Conv2DFlipout,
    Conv2DLocalReparameterization,
    Conv2DReparameterization,
    Conv3DFlipout,
    Conv3DLocalReparameterization,
    Conv3DReparameterization,
    MeanFieldNormal,
)

LAYERS = {
    1: [Conv1DFlipout, Conv1DReparameterization, Conv1DLocalReparameterization],
    2: [Conv2DFlipout, Conv2DReparameterization, Conv2DLocalReparameterization],
    3: [Conv3DFlipout, Conv3DReparameterization, Conv3DLocalReparameterization],
}
rng = np.random.default_rng(0)


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS[2])
def test_contract(layer):
    kwargs = {
        "filters": 3,
        "kernel_size": 3,
        "padding": "same",
        "strides": 2,
        "activation": "tanh",
        "num_examples": 50,
        "seed": 7,
    }
    check_layer(layer, kwargs, (4, 5, 5, 2))


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS[1] + LAYERS[3])
def test_contract_of_other_ranks(layer):
    kwargs = {"filters": 2, "kernel_size": 2, "num_examples": 50, "seed": 7}
    rank = 1 if layer in LAYERS[1] else 3
    check_layer(layer, kwargs, (2, *[3] * rank, 2))


ARGUMENTS = [
    (1, {"padding": "causal", "dilation_rate": 2}),
    (1, {"strides": 2}),
    (2, {"padding": "same", "strides": (2, 1)}),
    (2, {"dilation_rate": 2, "groups": 2}),
    (3, {"padding": "same"}),
]


@pytest.mark.parametrize("estimator", [0, 1, 2])
@pytest.mark.parametrize("rank, arguments", ARGUMENTS)
def test_a_point_is_the_plain_convolution(estimator, rank, arguments):
    point = MeanFieldNormal(is_singular=True)
    layer = LAYERS[rank][estimator](
        4, 3, kernel_posterior_fn=point, activation="relu", **arguments
    )
    plain = getattr(keras.layers, f"Conv{rank}D")(4, 3, activation="relu", **arguments)
    x = rng.normal(size=(2, *[7] * rank, 2)).astype("float32")
    expected = plain(x)
    assert layer.compute_output_shape(x.shape) == tuple(expected.shape)
    layer.build(x.shape)
    layer.weights[0].assign(plain.kernel)
    plain.bias.assign(rng.normal(size=4))
    layer.weights[1].assign(plain.bias)
    np.testing.assert_allclose(numpy(layer(x)), numpy(plain(x)), 1e-4, 1e-4)


def test_each_row_has_the_kernel_of_its_signs():
    layer = Conv2DFlipout(2, 2, seed=3, bias_posterior_fn=None)
    x = rng.normal(size=(12, 4, 4, 2)).astype("float32")
    own_signs = []
    layer.build(x.shape)
    layer.weights[1].assign(rng.normal(size=layer.weights[1].shape))
    state = ops.convert_to_numpy(layer.seed_generator.state)
    y = numpy(layer(x))
    layer.seed_generator.state.assign(state)
    q = layer.kernel_posterior
    mean, delta = numpy(q.mean()), numpy(q.perturbation(layer.seed_generator))
    for n in range(12):
        found = []
        for s, r in itertools.product(itertools.product([-1, 1], repeat=2), repeat=2):
            kernel = (mean + delta * np.outer(s, r)).astype("float32")
            own = ops.conv(x[n : n + 1], kernel, data_format="channels_last")
            if np.allclose(numpy(own)[0], y[n], atol=1e-4):
                found.append((s[0] * s[1], r[0] * r[1]))
        assert len(found) == 2  # (s, r) and (-s, -r)
        own_signs.append(found[0])
    # Channels have signs of their own.
    assert {s for s, _ in own_signs} == {r for _, r in own_signs} == {-1, 1}


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS[2])
def test_the_variance_of_every_output(layer):
    """x² * σ² for all estimators; LocalReparameterization draws each position."""
    layer = layer(2, 2, seed=3, bias_posterior_fn=None)
    x = rng.normal(size=(1, 4, 4, 2)).astype("float32")
    layer.build(x.shape)
    layer.weights[1].assign(rng.normal(size=layer.weights[1].shape))
    mean, std = (
        numpy(v()) for v in (layer.kernel_posterior.mean, layer.kernel_posterior.stddev)
    )
    # Each batch of one is a draw of its own.
    model = keras.Sequential([keras.Input((4, 4, 2)), layer])
    y = model.predict(np.repeat(x, 1500, 0), batch_size=1, verbose=0)
    y = y.astype("float64")

    def conv(x, kernel):
        kernel = kernel.astype("float32")
        return numpy(ops.conv(x, kernel, data_format="channels_last"))[0]

    variance = conv(x**2, std**2)
    np.testing.assert_allclose(y.var(0), variance, rtol=0.2)
    assert (np.abs(y.mean(0) - conv(x, mean)) < 5 * np.sqrt(variance / 1500)).all()
    z = (y - y.mean(0)) / y.std(0)
    neighbours = np.abs((z[:, :, 1:] * z[:, :, :-1]).mean(0)).max()
    independent = layer.estimator is Conv2DLocalReparameterization.estimator
    assert (neighbours < 0.13) == independent


def test_channels_first_is_channels_last():
    """With the same draws; where the backend has no such convolution, its shapes."""
    options = {"seed": 3, "padding": "same", "strides": 2}
    last = Conv2DFlipout(4, 3, data_format="channels_last", **options)
    first = Conv2DFlipout(4, 3, data_format="channels_first", **options)
    x = rng.normal(size=(3, 5, 5, 2)).astype("float32")
    last.build(x.shape)
    first.build(x.transpose(0, 3, 1, 2).shape)
    for a, b in zip(first.weights, last.weights, strict=True):
        assert a.shape == b.shape
    if keras.backend.backend() == "tensorflow":
        shape = first.compute_output_shape((3, 2, 5, 5))
        assert shape == (3, 4, 3, 3)
        return
    first.set_weights(last.get_weights())
    y = numpy(first(x.transpose(0, 3, 1, 2))).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(y, numpy(last(x)), 1e-4, 1e-4)


def test_rows_share_a_kernel_only_with_reparameterization():
    x = np.ones((3, 4, 4, 2), "float32")
    shared = numpy(Conv2DReparameterization(4, 3)(x))
    np.testing.assert_allclose(shared[0], shared[1], rtol=1e-5)
    own = numpy(Conv2DFlipout(4, 3, seed=0)(x))
    assert not np.allclose(own[0], own[1])


@pytest.mark.parametrize(
    "kwargs, message", [({"filters": 0}, "filters"), ({"groups": 3}, "groups")]
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Conv2DFlipout(**{"filters": 6, "kernel_size": 3, **kwargs})(
            np.ones((1, 5, 5, 4), "float32")
        )
