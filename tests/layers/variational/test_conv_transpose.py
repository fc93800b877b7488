import itertools

import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from kzoo.layers import (
    Conv2DTransposeFlipout,
    Conv2DTransposeLocalReparameterization,
    Conv2DTransposeReparameterization,
    MeanFieldNormal,
    PosteriorSamples,
)

LAYERS = [
    Conv2DTransposeFlipout,
    Conv2DTransposeReparameterization,
    Conv2DTransposeLocalReparameterization,
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
        "filters": 2,
        "kernel_size": 2,
        "padding": "same",
        "strides": 2,
        "activation": "tanh",
        "num_examples": 50,
        "seed": 7,
    }
    check_layer(layer, kwargs, (4, 3, 3, 2))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"strides": (2, 1), "output_padding": (1, 0), "padding": "same"},
        {"strides": 2},
        # TensorFlow has it not on the CPU.
        pytest.param({"dilation_rate": 2}, marks=pytest.mark.jax),
    ],
)
def test_a_point_is_the_plain_layer(layer, arguments):
    point = MeanFieldNormal(is_singular=True)
    arguments = {**arguments, "activation": "relu", "dtype": DTYPE}
    layer = layer(3, (2, 3), kernel_posterior_fn=point, **arguments)
    plain = keras.layers.Conv2DTranspose(3, (2, 3), **arguments)
    x = images(2, 4, 5, 2)
    assert layer.compute_output_shape(x.shape) == tuple(plain(x).shape)
    layer.build(x.shape)
    plain.bias.assign(rng.normal(size=3))
    for ours, theirs in zip(layer.trainable_weights, plain.weights, strict=True):
        ours.assign(theirs)
    np.testing.assert_allclose(numpy(layer(x)), numpy(plain(x)), TOL, TOL)


def test_each_row_has_the_kernel_of_its_signs():
    """y_n = x_n *ᵀ (W̄ + ΔW̃ ∘ (r_n s_nᵀ)), of one of the 2^(C+F) patterns."""
    layer = Conv2DTransposeFlipout(
        2, 2, strides=2, seed=3, bias_posterior_fn=None, dtype=DTYPE
    )
    x = images(8, 2, 2, 2)
    layer.build(x.shape)
    y, mean, delta = drawn(layer, x)
    signs = np.array(list(itertools.product([-1, 1], repeat=4)))
    patterns = []
    for n in range(len(x)):
        own = [
            numpy(
                ops.conv_transpose(
                    x[n : n + 1],
                    (mean + delta * np.outer(v[:2], v[2:])).astype(DTYPE),
                    strides=2,
                    data_format="channels_last",
                )
            )[0]
            for v in signs
        ]
        fits = [i for i in range(16) if np.allclose(own[i], y[n], TOL, TOL)]
        assert len(fits) == 2  # (r, s) and (-r, -s)
        patterns.append(signs[fits[0]])
    # Channels have signs of their own.
    assert {tuple(v[:2] * v[1]) for v in patterns} == {(-1, 1), (1, 1)}
    assert {tuple(v[2:] * v[3]) for v in patterns} == {(-1, 1), (1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_mean_variance_and_covariance_of_rows(layer):
    """E[y] = x *ᵀ W̄, Var[y] = x² *ᵀ σ²; rows covary where they share one kernel."""
    layer = layer(2, 2, strides=2, seed=3, bias_posterior_fn=None, dtype=DTYPE)
    x = np.repeat(images(1, 2, 2, 2), 2, 0)
    layer.build(x.shape)
    layer.trainable_weights[1].assign(rng.normal(size=layer.kernel.shape))
    q, draws = layer.kernel_posterior, 1000
    model = keras.Sequential([keras.Input((2, 2, 2)), layer])
    # Each batch of two rows is a draw of its own.
    y = model.predict(np.tile(x, (draws, 1, 1, 1)), batch_size=2, verbose=0)
    y = y.astype("float64").reshape(draws, 2, -1)
    expected = numpy(layer.linear(x, q.mean()))[0].ravel()
    variance = numpy(layer.linear(x**2, q.stddev() ** 2))[0].ravel()
    assert (np.abs(y.mean(0) - expected) < 5 * np.sqrt(variance / draws)).all()
    np.testing.assert_allclose(y.var(0), np.stack([variance] * 2), rtol=0.25)
    z = (y - expected) / np.sqrt(variance)
    correlation = (z[:, 0] * z[:, 1]).mean(0)
    shared = layer.estimator is Conv2DTransposeReparameterization.estimator
    np.testing.assert_allclose(correlation, float(shared), atol=0.15)


def test_the_divergence_is_counted_once():
    layer = Conv2DTransposeFlipout(2, 2, num_examples=10, seed=3, dtype=DTYPE)
    x = images(2, 3, 3, 2)
    layer(x), layer(x)
    q = layer.kernel_posterior
    mean, std = numpy(q.mean()), numpy(q.stddev())
    expected = 0.5 * (std**2 + mean**2 - 1 - 2 * np.log(std)).sum() / 10
    np.testing.assert_allclose(numpy(sum(layer.losses)), expected, 1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_samples_of_the_posterior_are_plain_layers(jit):
    layer = Conv2DTransposeFlipout(2, 2, strides=2, bias_posterior_fn=None)
    model = keras.Sequential([keras.Input((2, 2, 1)), layer])
    samples = PosteriorSamples(model, 3, seed=0)
    samples.compile(jit_compile=jit)
    x = rng.normal(size=(2, 2, 2, 1)).astype("float32")
    y = samples.predict(np.concatenate([x, 2 * x]), verbose=0)
    assert y.shape == (4, 3, 4, 4, 2)
    # One kernel a draw, the same for all rows: linear, and the draws differ.
    np.testing.assert_allclose(y[2:], 2 * y[:2], 1e-4, 1e-5)
    assert not np.allclose(y[:, 0], y[:, 1])


def test_channels_first_has_the_plain_layers_shapes():
    arguments = {"strides": 2, "data_format": "channels_first"}
    layer = Conv2DTransposeFlipout(4, 3, **arguments)
    layer.build((3, 2, 5, 5))
    assert layer.kernel.shape == (3, 3, 4, 2)
    assert layer.compute_output_shape((3, 2, 5, 5)) == (3, 4, 11, 11)
    if keras.backend.backend() == "jax":  # TensorFlow has none on the CPU.
        assert layer(images(3, 2, 5, 5)).shape == (3, 4, 11, 11)


def test_refuses():
    with pytest.raises(ValueError, match="filters=0"):
        Conv2DTransposeFlipout(0, 3)
    with pytest.raises(ValueError, match="output_padding"):
        Conv2DTransposeFlipout(2, 3, output_padding=1)
    with pytest.raises(ValueError, match="Received: inputs of shape"):
        Conv2DTransposeFlipout(2, 3).build((None, 4, 4, None))
