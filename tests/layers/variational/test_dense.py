import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from harness.backends import gradients
from kzoo.layers import (
    DenseFlipout,
    DenseLocalReparameterization,
    DenseReparameterization,
    MeanFieldNormal,
    NormalPrior,
    ScaleMixturePrior,
)
from kzoo.layers.variational.distributions import softplus

LAYERS = [DenseFlipout, DenseReparameterization, DenseLocalReparameterization]
B, IN, UNITS = 6, 5, 3
rng = np.random.default_rng(0)


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def made(layer=DenseFlipout, **kwargs):
    """A built layer with random means and scales."""
    layer = layer(UNITS, seed=3, **kwargs)
    layer.build((None, IN))
    layer.set_weights(
        [
            rng.normal(size=w.shape) if len(w.shape) else ops.convert_to_numpy(w)
            for w in layer.weights
        ]
    )
    return layer


def same_draws(layer, function):
    """What a function gives from the state of the layer's seed, which then is back."""
    state = ops.convert_to_numpy(layer.seed_generator.state)
    result = function()
    layer.seed_generator.state.assign(state)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_contract(layer):
    kwargs = {
        "units": 3,
        "activation": "tanh",
        "bias_posterior_fn": MeanFieldNormal(),
        "bias_prior_fn": NormalPrior(0.1, 2.0),
        "num_examples": 50,
        "seed": 7,
    }
    check_layer(layer, kwargs, (4, 5))


def test_each_row_has_the_kernel_of_its_signs():
    layer = made()
    x = rng.normal(size=(B, IN)).astype("float32")
    y = same_draws(layer, lambda: numpy(layer(x)))
    # All rows of one batch share ΔW̃.
    q = layer.kernel_posterior
    mean, delta = numpy(q.mean()), numpy(q.perturbation(layer.seed_generator))
    bias = numpy(layer.bias_posterior.mean())
    # Solve for the signs of each row: exactly one pair of patterns explains it.
    for n in range(B):
        found = 0
        for s in np.array(np.meshgrid(*[[-1, 1]] * IN)).T.reshape(-1, IN):
            for r in np.array(np.meshgrid(*[[-1, 1]] * UNITS)).T.reshape(-1, UNITS):
                own = x[n] @ (mean + delta * np.outer(s, r)) + bias
                found += np.allclose(own, y[n], atol=1e-4)
        assert found == 2  # (s, r) and (-s, -r)


def test_draws_are_new_at_each_call_and_for_each_row():
    layer = made()
    x = np.ones((B, IN), "float32")
    first, second = numpy(layer(x)), numpy(layer(x))
    assert not np.isclose(first, second).any()
    assert len(np.unique(first.round(4), axis=0)) > 1
    shared = numpy(made(DenseReparameterization)(x))
    np.testing.assert_allclose(shared, shared[:1].repeat(B, 0), rtol=1e-5)


def test_signs_are_new_at_each_call_and_independent(monkeypatch):
    """With one ΔW̃ for all calls; ΔW̃ ∘ (s rᵀ) is read off rows of the identity."""
    layer = made(bias_posterior_fn=None)
    posterior = type(layer.kernel_posterior)
    monkeypatch.setattr(posterior, "perturbation", lambda self, seed: self.stddev())
    rows = np.eye(IN, dtype="float32").repeat(400, 0)
    mean, std = (
        numpy(v()) for v in (layer.kernel_posterior.mean, layer.kernel_posterior.stddev)
    )
    patterns = []
    for _ in range(2):
        found = (numpy(layer(rows)).reshape(IN, 400, UNITS) - mean[:, None]) / std[
            :, None
        ]
        np.testing.assert_allclose(np.abs(found), 1, atol=1e-4)
        # s_i r_o has mean 0, and the products of two columns too: r is no copy of s.
        assert np.abs(found.mean(1)).max() < 0.25
        assert np.abs((found[..., 0] * found[..., 1]).mean(1)).max() < 0.25
        patterns.append(np.sign(found))
    agreement = (patterns[0] * patterns[1]).mean()
    assert abs(agreement) < 0.1


def test_signs_of_input_and_output_are_drawn_apart():
    """Were r = s, the diagonal of ΔW̃ ∘ (s rᵀ) would never change its sign."""
    layer = DenseFlipout(IN, seed=3, bias_posterior_fn=None)
    layer.build((None, IN))
    layer.kernel.variables[0].assign(np.zeros((IN, IN)))
    y = numpy(layer(np.eye(IN, dtype="float32").repeat(200, 0))).reshape(IN, 200, IN)
    signs = np.sign(y)
    assert np.abs(signs.mean(1)).max() < 0.3


def test_positions_have_signs_of_their_own():
    layer = made(bias_posterior_fn=None)
    y = numpy(layer(np.ones((2, 50, IN), "float32")))
    assert len(np.unique(y[0].round(4), axis=0)) > 20


@pytest.mark.parametrize("layer", LAYERS)
def test_the_mean_gradient_is_that_of_every_estimator(layer):
    """Of a loss that is quadratic in the output, whose expectation is known.

    E[|x W|²] = |x W̄|² + x² σ², so its gradients are 2 xᵀ x W̄ for the mean and
    2 (x²)ᵀ σ for the standard deviation.
    """
    layer = made(layer, bias_posterior_fn=None)
    x = rng.normal(size=(1, IN)).astype("float32")
    q = layer.kernel_posterior
    mean, std = numpy(q.mean()), numpy(q.stddev())
    rows, calls = ops.convert_to_tensor(np.repeat(x, 500, 0)), 60
    variables = layer.trainable_weights
    sums = []
    for _ in range(calls):
        seed = layer.seed_generator.next()

        def loss(loc, rho, seed=seed):
            normal = type(q)(loc, lambda: softplus(rho), q.shape, q.dtype)
            shapes = layer._sign_shapes(rows.shape)
            kernel = layer.estimator.draw(normal, shapes, seed, "float32")
            y = layer.estimator.apply(layer.linear, rows, kernel)
            return ops.sum(ops.square(y)) / len(rows)

        found = gradients(loss, *(numpy(v).astype("float32") for v in variables))
        sums.append(np.stack([numpy(g) for g in found]))
    slope = 1 / (1 + np.exp(-numpy(variables[1])))
    expected = np.stack([2 * x.T @ (x @ mean), 2 * (x**2).T * std * slope])
    error = np.std(sums, 0) / np.sqrt(calls)
    assert (np.abs(np.mean(sums, 0) - expected) < 5 * error + 1e-3).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_point_is_a_plain_dense_layer(layer):
    layer = made(layer, kernel_posterior_fn=MeanFieldNormal(is_singular=True))
    plain = keras.layers.Dense(UNITS)
    plain.build((None, IN))
    plain.set_weights([numpy(w) for w in layer.weights[:2]])
    x = rng.normal(size=(B, 2, IN)).astype("float32")
    np.testing.assert_allclose(numpy(layer(x)), numpy(plain(x)), 1e-5, 1e-5)


def test_the_divergence_in_closed_form():
    layer = made(kernel_prior_fn=NormalPrior(0.5, 2.0), num_examples=10)
    mean, rho = (numpy(w) for w in layer.weights[:2])
    std = np.log1p(np.exp(rho))
    kl = np.log(2 / std) + (std**2 + (mean - 0.5) ** 2) / (2 * 2**2) - 0.5
    np.testing.assert_allclose(numpy(sum(layer.losses)), kl.sum() / 10, rtol=1e-5)


def test_the_divergence_counts_once_however_often_the_layer_is_called():
    x = keras.Input((IN,))
    layer = DenseFlipout(IN, num_examples=7)
    model = keras.Model(x, layer(layer(x)))
    model(np.ones((2, IN), "float32"))
    expected = numpy(layer.kernel.divergence()) / 7
    np.testing.assert_allclose(numpy(sum(model.losses)), expected, rtol=1e-6)


def test_a_layer_built_frozen_can_be_thawed():
    layer = made(num_examples=7, trainable=False)
    assert not layer.trainable_weights and not layer.losses
    layer.trainable = True
    assert len(layer.trainable_weights) == 3
    expected = numpy(layer.kernel.divergence()) / 7
    np.testing.assert_allclose(numpy(sum(layer.losses)), expected, rtol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1])
def test_the_divergence_stays_if_a_part_is_frozen(frozen):
    layer = made(num_examples=7)
    expected = numpy(layer.kernel.divergence()) / 7
    layer.kernel.variables[frozen].trainable = False
    np.testing.assert_allclose(numpy(sum(layer.losses)), expected, rtol=1e-6)


def test_the_bias_is_drawn_and_has_its_divergence():
    options = {
        "kernel_prior_fn": None,
        "bias_posterior_fn": MeanFieldNormal(),
        "bias_prior_fn": NormalPrior(0.5, 2.0),
        "num_examples": 10,
    }
    layer = made(**options)
    mean, std = numpy(layer.bias_posterior.mean()), numpy(layer.bias_posterior.stddev())
    kl = np.log(2 / std) + (std**2 + (mean - 0.5) ** 2) / (2 * 2**2) - 0.5
    np.testing.assert_allclose(numpy(sum(layer.losses)), kl.sum() / 10, rtol=1e-5)
    x = np.zeros((2, IN), "float32")
    draws = np.array([numpy(layer(x)) for _ in range(400)])
    np.testing.assert_array_equal(draws[:, 0], draws[:, 1])  # One for the batch.
    np.testing.assert_allclose(draws[:, 0].mean(0), mean, atol=0.25 * std.max())
    np.testing.assert_allclose(draws[:, 0].std(0), std, rtol=0.15)


def test_weights_of_another_data_set_leave_the_number_of_examples():
    large, small = made(num_examples=50_000), made(num_examples=100)
    small.set_weights(large.get_weights())
    expected = numpy(small.kernel.divergence()) / 100
    np.testing.assert_allclose(numpy(sum(small.losses)), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["mixed_float16", "float16", "mixed_bfloat16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_half_precision_neither_loses_the_noise_nor_overflows(layer, dtype):
    scale = keras.initializers.Constant(-9.0)  # σ = 1.2e-4
    posterior = MeanFieldNormal(False, "zeros", scale)
    layer = layer(
        UNITS,
        kernel_posterior_fn=posterior,
        bias_posterior_fn=None,
        num_examples=5,
        seed=0,
        dtype=dtype,
    )
    x = np.full((64, IN), 300.0, "float16")
    y = numpy(layer(x))
    expected = np.sqrt(IN) * 300 * numpy(layer.kernel_posterior.stddev())[0, 0]
    assert np.abs(y).max() < 6 * expected
    if layer.estimator is not DenseReparameterization.estimator:
        np.testing.assert_allclose(np.sqrt((y**2).mean()), expected, rtol=0.6)
    loss = sum(layer.losses)
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    assert np.isfinite(numpy(loss)) and numpy(loss) > 0


def test_a_weights_own_regularizer_stays():
    posterior = MeanFieldNormal(loc_regularizer=keras.regularizers.L2(0.5))
    layer = made(kernel_posterior_fn=posterior, num_examples=7)
    expected = numpy(layer.kernel.divergence()) / 7
    expected += 0.5 * (numpy(layer.weights[0]) ** 2).sum()
    np.testing.assert_allclose(numpy(sum(layer.losses)), expected, rtol=1e-5)


# Flipout's rows share |ΔW̃|, so its steps tell less of σ.
@pytest.mark.parametrize(
    "layer, rtol", [(DenseLocalReparameterization, 0.06), (DenseFlipout, 0.12)]
)
def test_the_exact_posterior_of_linear_regression(layer, rtol):
    """The optimum of the ELBO with noise of variance 1 is known in closed form.

    With orthogonal inputs, Xᵀ X = diag(c), the posterior's entries are independent,
    and so within the family: precision c + 1/s², mean (Xᵀ y) / (c + 1/s²).
    """
    n, s = 64, 0.7
    x = np.linalg.qr(rng.normal(size=(n, 4)))[0] * np.array([3.0, 2.0, 1.0, 4.0])
    y = x @ rng.normal(size=(4, 1)) + rng.normal(size=(n, 1))
    precision = (x**2).sum(0) + 1 / s**2
    mean, std = (x.T @ y)[:, 0] / precision, precision**-0.5

    layer = layer(
        1,
        kernel_prior_fn=NormalPrior(scale=s),
        bias_posterior_fn=None,
        num_examples=n,
        seed=0,
    )
    model = keras.Sequential([keras.Input((4,)), layer])
    # -log N(y | f, 1) = (y - f)² / 2 + constant: half of Keras's mean squared error.
    rate = keras.optimizers.schedules.CosineDecay(0.05, 1500)
    model.compile(
        keras.optimizers.Adam(rate), lambda t, p: 0.5 * ops.mean((t - p) ** 2, -1)
    )
    # Each step has all rows, eight times: the same mean, with less noise.
    model.fit(*(np.tile(a, (8 * 1500, 1)) for a in (x, y)), 8 * n, 1, 0, shuffle=False)
    q = layer.kernel_posterior
    np.testing.assert_allclose(numpy(q.mean())[:, 0], mean, atol=0.03)
    np.testing.assert_allclose(numpy(q.stddev())[:, 0], std, rtol=rtol)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"units": 0}, "units=0"),
        ({"units": True}, "units=True"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"num_examples": "5"}, "num_examples='5'"),
        ({"num_examples": True}, "num_examples=True"),
        ({"num_examples": float("inf")}, "num_examples=inf"),
        ({"kernel_prior_fn": 1.0}, "kernel_prior_fn=1.0"),
        ({"bias_prior_fn": MeanFieldNormal(is_singular=True)}, "bias_prior_fn.*infin"),
        ({"kernel_posterior_fn": ScaleMixturePrior()}, "kernel_posterior_fn=.*Mixture"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DenseFlipout(**{"units": 3, **kwargs}).build((None, IN))


def test_a_seed_of_numpy_is_saved():
    layer = DenseFlipout(2, seed=np.int64(3))
    assert type(layer.get_config()["seed"]) is int
