import itertools

import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from kzoo.layers import (
    EmbeddingFlipout,
    EmbeddingLocalReparameterization,
    EmbeddingReparameterization,
    MeanFieldNormal,
    PosteriorMean,
    PosteriorSamples,
)

LAYERS = [
    EmbeddingFlipout,
    EmbeddingReparameterization,
    EmbeddingLocalReparameterization,
]
DTYPE = "float64" if keras.backend.backend() == "tensorflow" else "float32"
TOL = 1e-12 if DTYPE == "float64" else 1e-5
rng = np.random.default_rng(0)


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def wide(layer):
    """Gives a built layer scales that differ."""
    layer.trainable_weights[1].assign(rng.normal(size=layer.kernel.shape))
    return layer


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_contract(layer):
    kwargs = {
        "input_dim": 3,
        "output_dim": 2,
        "mask_zero": True,
        "num_examples": 50,
        "seed": 7,
    }
    check_layer(layer, kwargs, (4, 3), input_dtype="int32")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "float32"])
@pytest.mark.parametrize("shape", [(4,), (4, 3, 2)])
def test_a_point_is_the_plain_layer(layer, dtype, shape):
    point = MeanFieldNormal(is_singular=True)
    layer = layer(7, 3, mask_zero=True, kernel_posterior_fn=point)
    plain = keras.layers.Embedding(7, 3, mask_zero=True)
    ids = ops.convert_to_tensor(rng.integers(7, size=shape).astype(dtype))
    expected = plain(ids)
    layer.build(shape)
    layer.trainable_weights[0].assign(plain.embeddings)
    np.testing.assert_array_equal(numpy(layer(ids)), numpy(expected))
    np.testing.assert_array_equal(layer.compute_mask(ids), plain.compute_mask(ids))
    assert layer.compute_output_shape(shape) == (*shape, 3)


def test_each_example_has_the_table_of_its_signs():
    """y_n = (W̄ + ΔW̃ ∘ (1 r_nᵀ))[id], of one of the 2^D patterns, at all positions."""
    layer = EmbeddingFlipout(5, 3, seed=3, dtype=DTYPE)
    ids = rng.integers(5, size=(30, 6))
    layer.build(ids.shape)
    wide(layer)
    state = ops.convert_to_numpy(layer.seed_generator.state)
    y = numpy(layer(ids))
    layer.seed_generator.state.assign(state)
    q = layer.kernel_posterior
    mean, delta = numpy(q.mean()), numpy(q.perturbation(layer.seed_generator))
    signs = list(itertools.product([-1, 1], repeat=3))
    patterns = []
    for n in range(len(ids)):
        fits = [r for r in signs if np.allclose((mean + delta * r)[ids[n]], y[n], TOL)]
        assert len(fits) == 1
        patterns += fits
    assert len(set(patterns)) > 4


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_mean_variance_and_covariance_of_examples(layer):
    """E[y] = W̄[id], Var[y] = σ²[id]; who shares a draw covaries."""
    layer = layer(2, 2, seed=3, dtype=DTYPE)
    ids = np.array([[0, 1, 0]] * 2)
    layer.build(ids.shape)
    q, draws = wide(layer).kernel_posterior, 1500
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layer])
    # Each batch of two examples is a draw of its own.
    y = model.predict(np.tile(ids, (draws, 1)), batch_size=2, verbose=0)
    y = y.astype("float64").reshape(draws, 2, 3, 2)
    mean, std = numpy(q.mean())[ids[0]], numpy(q.stddev())[ids[0]]
    z = (y - mean) / std
    assert (np.abs(z.mean(0)) < 5 / np.sqrt(draws)).all()
    np.testing.assert_allclose(z.var(0), 1, rtol=0.2)

    def correlation(a, b):
        return (a * b).mean(0)

    shared = layer.estimator is EmbeddingReparameterization.estimator
    local = layer.estimator is EmbeddingLocalReparameterization.estimator
    close = np.testing.assert_allclose
    close(correlation(z[:, 0], z[:, 1]), float(shared), atol=0.12)
    # Of one example: ids apart are independent, one id twice is one vector.
    close(correlation(z[:, 0, 0], z[:, 0, 1]), 0, atol=0.12)
    close(correlation(z[:, 0, 0], z[:, 0, 2]), float(not local), atol=0.12)


@pytest.mark.parametrize("layer", LAYERS)
def test_half_precision_tells_ids_apart(layer):
    """2049 is no number of float16, nor 257 of bfloat16."""
    ids = np.array([[2047, 2048, 2049, 256, 257]], "int32")
    for policy in ("mixed_float16", "mixed_bfloat16"):
        point = MeanFieldNormal(is_singular=True)
        half = layer(2100, 4, kernel_posterior_fn=point, dtype=policy)
        for given in (ids, ids.astype("float32")):
            y = half(given)
            assert keras.backend.standardize_dtype(y.dtype) == policy[6:]
            expected = numpy(half.kernel_posterior.mean())[ids]
            np.testing.assert_allclose(numpy(y), expected, 1e-2)
        drawn = layer(2100, 4, dtype=policy)(ids)
        assert np.isfinite(numpy(drawn)).all()


def test_the_divergence_is_counted_once():
    layer = EmbeddingFlipout(3, 2, num_examples=10, seed=3, dtype=DTYPE)
    ids = np.array([[0, 1]])
    layer(ids), layer(ids)
    q = layer.kernel_posterior
    mean, std = numpy(q.mean()), numpy(q.stddev())
    expected = 0.5 * (std**2 + mean**2 - 1 - 2 * np.log(std)).sum() / 10
    np.testing.assert_allclose(numpy(sum(layer.losses)), expected, 1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_each_sample_of_the_posterior_is_one_table(jit):
    layer = EmbeddingFlipout(5, 2)
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layer])
    ids = np.array([[0, 1, 0], [4, 0, 1]], "int32")
    samples = PosteriorSamples(model, 4, seed=0)
    samples.compile(jit_compile=jit)
    y = samples.predict(ids, verbose=0)
    assert y.shape == (2, 4, 3, 2)
    np.testing.assert_array_equal(y[0, :, 0], y[0, :, 2])
    np.testing.assert_array_equal(y[0, :, :2], y[1, :, 1:])
    assert len(np.unique(y[0, :, 0, 0])) == 4
    mean = PosteriorMean(model).predict(ids, verbose=0)
    np.testing.assert_array_equal(mean, numpy(layer.kernel_posterior.mean())[ids])


def test_masks_reach_the_next_layer():
    layer = EmbeddingFlipout(5, 2, mask_zero=True, seed=0)
    pool = keras.layers.GlobalAveragePooling1D()
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layer, pool])
    mean = PosteriorMean(model)
    y = numpy(mean(np.array([[1, 2, 0], [1, 2, 2]])))
    table = numpy(layer.kernel_posterior.mean())
    np.testing.assert_allclose(y[0], table[[1, 2]].mean(0), 1e-5)
    np.testing.assert_allclose(y[1], table[[1, 2, 2]].mean(0), 1e-5)
    assert EmbeddingFlipout(5, 2).compute_mask(np.array([[0]])) is None


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"input_dim": 0}, "input_dim=0"),
        ({"output_dim": 1.5}, "output_dim=1.5"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"bias_posterior_fn": MeanFieldNormal()}, "bias_posterior_fn="),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=f"Received: {message}"):
        EmbeddingFlipout(**{"input_dim": 5, "output_dim": 2, **kwargs})
