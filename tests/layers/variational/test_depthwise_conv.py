import itertools

import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from kzoo.layers import (
    DepthwiseConv2DFlipout,
    DepthwiseConv2DLocalReparameterization,
    DepthwiseConv2DReparameterization,
    MeanFieldNormal,
    PosteriorSamples,
)

LAYERS = [
    DepthwiseConv2DFlipout,
    DepthwiseConv2DReparameterization,
    DepthwiseConv2DLocalReparameterization,
]
DTYPE = "float64" if keras.backend.backend() == "tensorflow" else "float32"
TOL = 1e-10 if DTYPE == "float64" else 1e-4
rng = np.random.default_rng(0)


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def images(*shape):
    return rng.normal(size=shape).astype(DTYPE)


def drawn(layer, x):
    """The layer's output, then q's mean and the perturbation that it drew."""
    layer.trainable_weights[1].assign(rng.normal(size=layer.kernel.shape))
    state = ops.convert_to_numpy(layer.seed_generator.state)
    y = numpy(layer(x))
    layer.seed_generator.state.assign(state)
    q = layer.kernel_posterior
    return y, numpy(q.mean()), numpy(q.perturbation(layer.seed_generator))


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_contract(layer):
    kwargs = {
        "kernel_size": 2,
        "padding": "same",
        "strides": 2,
        "depth_multiplier": 2,
        "activation": "tanh",
        "num_examples": 50,
        "seed": 7,
    }
    check_layer(layer, kwargs, (4, 3, 3, 2))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"strides": 2, "padding": "same"},
        {"depth_multiplier": 3},
        {"dilation_rate": 2, "depth_multiplier": 2},
    ],
)
def test_a_point_is_the_plain_layer(layer, arguments):
    point = MeanFieldNormal(is_singular=True)
    arguments = {**arguments, "activation": "relu", "dtype": DTYPE}
    layer = layer((2, 3), kernel_posterior_fn=point, **arguments)
    plain = keras.layers.DepthwiseConv2D((2, 3), **arguments)
    x = images(2, 5, 6, 2)
    assert layer.compute_output_shape(x.shape) == tuple(plain(x).shape)
    layer.build(x.shape)
    plain.bias.assign(rng.normal(size=plain.bias.shape))
    for ours, theirs in zip(layer.trainable_weights, plain.weights, strict=True):
        ours.assign(theirs)
    np.testing.assert_allclose(numpy(layer(x)), numpy(plain(x)), TOL, TOL)


def test_each_row_has_the_kernel_of_its_signs():
    """y_n = x_n ⊛ (W̄ + ΔW̃[..., c, m] r_n[c M + m]), of one of the 2^(C M) patterns."""
    layer = DepthwiseConv2DFlipout(
        2, depth_multiplier=2, seed=3, bias_posterior_fn=None, dtype=DTYPE
    )
    x = images(12, 3, 3, 2)
    layer.build(x.shape)
    y, mean, delta = drawn(layer, x)
    signs = np.array(list(itertools.product([-1, 1], repeat=4)))
    patterns = []
    for n in range(len(x)):
        own = [
            numpy(
                ops.depthwise_conv(
                    x[n : n + 1],
                    (mean + delta * v.reshape(2, 2)).astype(DTYPE),
                    data_format="channels_last",
                )
            )[0]
            for v in signs
        ]
        fits = [i for i in range(16) if np.allclose(own[i], y[n], TOL, TOL)]
        assert len(fits) == 1
        patterns.append(tuple(signs[fits[0]]))
    # Channels have signs of their own, and rows too.
    assert {(v[0] * v[1], v[2] * v[3]) for v in patterns} >= {(1, -1), (-1, 1)}
    assert len(set(patterns)) > 4


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_mean_variance_and_covariance_of_rows(layer):
    """E[y] = x ⊛ W̄, Var[y] = x² ⊛ σ²; rows covary where they share one kernel."""
    layer = layer(2, depth_multiplier=2, seed=3, bias_posterior_fn=None, dtype=DTYPE)
    x = np.repeat(images(1, 3, 3, 2), 2, 0)
    layer.build(x.shape)
    layer.trainable_weights[1].assign(rng.normal(size=layer.kernel.shape))
    q, draws = layer.kernel_posterior, 1000
    model = keras.Sequential([keras.Input((3, 3, 2)), layer])
    # Each batch of two rows is a draw of its own.
    y = model.predict(np.tile(x, (draws, 1, 1, 1)), batch_size=2, verbose=0)
    y = y.astype("float64").reshape(draws, 2, -1)
    expected = numpy(layer.linear(x, q.mean()))[0].ravel()
    variance = numpy(layer.linear(x**2, q.stddev() ** 2))[0].ravel()
    assert (np.abs(y.mean(0) - expected) < 5 * np.sqrt(variance / draws)).all()
    np.testing.assert_allclose(y.var(0), np.stack([variance] * 2), rtol=0.25)
    z = (y - expected) / np.sqrt(variance)
    correlation = (z[:, 0] * z[:, 1]).mean(0)
    shared = layer.estimator is DepthwiseConv2DReparameterization.estimator
    np.testing.assert_allclose(correlation, float(shared), atol=0.15)


def test_the_divergence_is_counted_once():
    layer = DepthwiseConv2DFlipout(2, num_examples=10, seed=3, dtype=DTYPE)
    x = images(2, 3, 3, 2)
    layer(x), layer(x)
    q = layer.kernel_posterior
    mean, std = numpy(q.mean()), numpy(q.stddev())
    expected = 0.5 * (std**2 + mean**2 - 1 - 2 * np.log(std)).sum() / 10
    np.testing.assert_allclose(numpy(sum(layer.losses)), expected, 1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_samples_of_the_posterior_are_plain_layers(jit):
    layer = DepthwiseConv2DFlipout(2, bias_posterior_fn=None)
    model = keras.Sequential([keras.Input((3, 3, 2)), layer])
    samples = PosteriorSamples(model, 3, seed=0)
    samples.compile(jit_compile=jit)
    x = rng.normal(size=(2, 3, 3, 2)).astype("float32")
    y = samples.predict(np.concatenate([x, 2 * x]), verbose=0)
    assert y.shape == (4, 3, 2, 2, 2)
    # One kernel a draw, the same for all rows: linear, and the draws differ.
    np.testing.assert_allclose(y[2:], 2 * y[:2], 1e-4, 1e-5)
    assert not np.allclose(y[:, 0], y[:, 1])


def test_channels_first_has_the_plain_layers_shapes():
    arguments = {"depth_multiplier": 2, "data_format": "channels_first"}
    layer = DepthwiseConv2DFlipout(3, **arguments)
    layer.build((3, 2, 5, 5))
    assert layer.kernel.shape == (3, 3, 2, 2)
    assert layer.compute_output_shape((3, 2, 5, 5)) == (3, 4, 3, 3)
    if keras.backend.backend() == "jax":  # TensorFlow has none on the CPU.
        assert layer(images(3, 2, 5, 5)).shape == (3, 4, 3, 3)


def test_refuses():
    with pytest.raises(ValueError, match="depth_multiplier=0"):
        DepthwiseConv2DFlipout(3, depth_multiplier=0)
    with pytest.raises(ValueError, match="Received: inputs of shape"):
        DepthwiseConv2DFlipout(3).build((None, 4, 4, None))
