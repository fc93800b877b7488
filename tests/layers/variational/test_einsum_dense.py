import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from kzoo.layers import (
    EinsumDenseFlipout,
    EinsumDenseLocalReparameterization,
    EinsumDenseReparameterization,
    MeanFieldNormal,
)

LAYERS = [
    EinsumDenseFlipout,
    EinsumDenseReparameterization,
    EinsumDenseLocalReparameterization,
]
rng = np.random.default_rng(0)


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_contract(layer):
    kwargs = {
        "equation": "abc,cde->abde",
        "output_shape": (None, 2, 3),
        "activation": "tanh",
        "bias_axes": "de",
        "num_examples": 50,
        "seed": 7,
    }
    check_layer(layer, kwargs, (4, 3, 5))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "equation, output_shape, bias_axes, shape",
    [
        ("abc,cde->abde", (None, 2, 3), "e", (4, 7, 5)),
        ("abc,cde->abde", (7, 2, 3), "d", (4, 7, 5)),
        ("abcd,cde->abe", (7, 5), "e", (4, 7, 2, 3)),
        ("...x,xy->...y", 3, "y", (4, 7, 2, 5)),
        ("ab...,bc->ac...", 3, "c", (4, 5, 7)),
        ("abc,bcd->abd", (7, 3), None, (4, 7, 5)),
        ("abc,cd->ad", 3, "d", (4, 7, 5)),
    ],
)
def test_a_point_is_the_plain_layer(layer, equation, output_shape, bias_axes, shape):
    arguments = {"bias_axes": bias_axes, "activation": "tanh"}
    point = MeanFieldNormal(is_singular=True)
    layer = layer(equation, output_shape, kernel_posterior_fn=point, **arguments)
    plain = keras.layers.EinsumDense(equation, output_shape, **arguments)
    x = rng.normal(size=shape).astype("float32")
    plain.build(shape)
    plain.set_weights([rng.normal(size=w.shape) for w in plain.weights])
    layer.build(shape)
    for ours, theirs in zip(layer.trainable_weights, plain.weights, strict=True):
        ours.assign(theirs)
    np.testing.assert_allclose(numpy(layer(x)), numpy(plain(x)), 1e-5, 1e-5)
    assert layer.compute_output_shape((None, *shape[1:]))[1:] == plain(x).shape[1:]


@pytest.mark.parametrize("equation", ["abc,cd->abd", "abc,bcd->abd"])
def test_each_row_and_position_has_signs_of_its_own(equation):
    """y = x (W̄ + ΔW̃ ∘ (s rᵀ)): y - x W̄ is one of the 2^(C+D) patterns' products."""
    layer = EinsumDenseFlipout(equation, (2, 2), seed=3)
    x = rng.normal(size=(3, 2, 3)).astype("float32")
    layer.build(x.shape)
    layer.trainable_weights[1].assign(rng.normal(size=layer.kernel.shape))
    state = ops.convert_to_numpy(layer.seed_generator.state)
    y = numpy(layer(x))
    layer.seed_generator.state.assign(state)
    q = layer.kernel_posterior
    mean, delta = numpy(q.mean()), numpy(q.perturbation(layer.seed_generator))
    if mean.ndim == 2:
        mean, delta = (np.stack([v, v]) for v in (mean, delta))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).T.reshape(-1, 5)
    patterns = np.zeros((3, 2), int)
    for n in range(3):
        for t in range(2):
            own = [
                x[n, t] @ (mean[t] + delta[t] * np.outer(v[:3], v[3:])) for v in signs
            ]
            fits = np.flatnonzero(np.isclose(own, y[n, t], atol=1e-4).all(1))
            assert len(fits) == 2  # (s, r) and (-s, -r)
            patterns[n, t] = fits[0]
    assert len(np.unique(patterns)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_an_axis_that_is_summed_meets_one_weight(layer):
    """y_d = (Σ_b x_b) W has the variance (Σ_b x_b)² σ², however it is estimated."""
    wide = MeanFieldNormal(loc_initializer="zeros")
    layer = layer("abc,cd->ad", 3, kernel_posterior_fn=wide, seed=0)
    x = rng.normal(1, 0.3, size=(1, 6, 5)).astype("float32")
    model = keras.Sequential([keras.Input((6, 5)), layer])
    # Each batch of one is a draw of its own.
    y = model.predict(np.repeat(x, 1500, 0), batch_size=1, verbose=0)
    std = numpy(layer.kernel_posterior.stddev())
    expected = x.sum(1)[0].astype("float64") ** 2 @ std**2
    np.testing.assert_allclose(y.var(0), expected, rtol=0.2)


def test_another_rank_is_refused():
    layer = EinsumDenseFlipout("abc,cd->abd", (None, 3))
    layer.build((None, 4, 5))
    with pytest.raises(ValueError, match="ndim=3"):
        layer(np.ones((2, 5), "float32"))


def test_refuses_axes_of_the_bias():
    with pytest.raises(ValueError, match="bias_axes='z'"):
        EinsumDenseFlipout("ab,bc->ac", 3, bias_axes="z").build((None, 5))
