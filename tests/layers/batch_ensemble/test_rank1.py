import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from harness.backends import gradients
from kzoo.layers import (
    CauchyPrior,
    Conv2DBatchEnsemble,
    Conv2DRank1,
    DenseBatchEnsemble,
    DenseRank1,
    MeanFieldNormal,
    NormalPrior,
    PosteriorMean,
    PosteriorSamples,
    TileMembers,
    batch_ensemble_initializer,
    kl_divergence,
    scale_divergence,
)
from kzoo.layers.ops.random import nth_seed, seed_pair

TENSORFLOW = keras.backend.backend() == "tensorflow"
DTYPE = "float64" if TENSORFLOW else "float32"
CLOSE = {"rtol": 1e-9, "atol": 1e-9} if TENSORFLOW else {"rtol": 1e-4, "atol": 1e-4}
M, B = 3, 2
KINDS = {
    "dense": (DenseRank1, DenseBatchEnsemble, {"units": 4}, (5,)),
    "positions": (DenseRank1, DenseBatchEnsemble, {"units": 4}, (3, 5)),
    "conv": (
        Conv2DRank1,
        Conv2DBatchEnsemble,
        {"filters": 4, "kernel_size": 2, "strides": 2},
        (5, 4, 2),
    ),
    "channels_first": (
        Conv2DRank1,
        Conv2DBatchEnsemble,
        {"filters": 4, "kernel_size": 2, "data_format": "channels_first"},
        (2, 5, 4),
    ),
}
# On CPUs TensorFlow has no convolution with channels first in float64.
ON_JAX = pytest.param("channels_first", marks=pytest.mark.jax)
each_kind = pytest.mark.parametrize("kind", ["dense", "positions", "conv", ON_JAX])
per_example = pytest.mark.parametrize("per_example", [True, False])
APART = MeanFieldNormal(
    loc_initializer=batch_ensemble_initializer(-0.5),
    untransformed_scale_initializer="zeros",
)
rng = np.random.default_rng(0)


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def inputs(kind, rows=M * B):
    x = np.random.default_rng(1).normal(size=(rows, *KINDS[kind][3]))
    return x.astype(DTYPE)


def made(kind, **kwargs):
    """A built layer with wide posteriors of different means, and with biases."""
    layer, _, own, shape = KINDS[kind]
    options = {
        "activation": "tanh",
        "ensemble_size": M,
        "alpha_posterior_fn": APART,
        "gamma_posterior_fn": APART,
        "bias_initializer": "random_normal",
        "seed": 3,
        "dtype": DTYPE,
    }
    layer = layer(**own, **{**options, **kwargs})
    layer.build((None, *shape))
    return layer


def with_points(kind, layer, r, s):
    """The BatchEnsemble layer with the same weights, and these for r and s."""
    _, twin, own, shape = KINDS[kind]
    twin = twin(**own, activation=layer.activation, ensemble_size=len(r), dtype=DTYPE)
    twin.build((None, *shape))
    twin.kernel.assign(layer.kernel)
    twin.bias.assign(np.repeat(numpy(layer.bias), len(r) // M, axis=0))
    twin.alpha.assign(r)
    twin.gamma.assign(s)
    return twin


def again(layer, function):
    """What a function gives from the state of the layer's seed, which then is back."""
    state = ops.convert_to_numpy(layer.seed_generator.state)
    result = function()
    layer.seed_generator.state.assign(state)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("kind, rows", [("dense", (6, 4)), ("conv", (4, 4, 3, 2))])
def test_contract(kind, rows):
    layer, _, own, _ = KINDS[kind]
    check_layer(
        layer,
        {
            **own,
            "activation": "tanh",
            "ensemble_size": 2,
            "alpha_posterior_fn": APART,
            "alpha_prior_fn": NormalPrior(0.5, 0.5),
            "gamma_posterior_fn": MeanFieldNormal(loc_initializer="random_uniform"),
            "gamma_prior_fn": CauchyPrior(1.0, 0.1),
            "per_example": kind == "dense",
            "num_examples": 50,
            "seed": 7,
            "kernel_initializer": "he_normal",
            "kernel_regularizer": "l2",
            "bias_initializer": "ones",
        },
        rows,
    )


@each_kind
def test_each_row_has_its_own_fast_weights(kind):
    layer, x = made(kind), inputs(kind)
    y = again(layer, lambda: numpy(layer(x)))
    draws = [
        numpy(weight.posterior.sample(layer.seed_generator, B))  # [B, M, n]
        for weight in (layer.alpha, layer.gamma)
    ]
    # Each row as a member of its own.
    r, s = (np.moveaxis(d, 1, 0).reshape(M * B, -1) for d in draws)
    assert len(np.unique(r, axis=0)) == M * B
    expected = numpy(with_points(kind, layer, r, s)(x))
    np.testing.assert_allclose(y, expected, **CLOSE)


@each_kind
def test_each_member_may_have_one_draw(kind):
    layer, x = made(kind, per_example=False), inputs(kind)
    y = again(layer, lambda: numpy(layer(x)))
    r, s = (
        numpy(weight.posterior.sample(layer.seed_generator))
        for weight in (layer.alpha, layer.gamma)
    )
    np.testing.assert_allclose(y, numpy(with_points(kind, layer, r, s)(x)), **CLOSE)


@per_example
def test_equal_rows_draw_apart_or_alike(per_example):
    layer = made("dense", per_example=per_example, bias_initializer="zeros")
    x = np.ones((4 * M, 5), DTYPE)
    first, second = (numpy(layer(x)).reshape(M, 4, 4) for _ in range(2))
    assert (first != second).all()  # New at each call.
    assert (first[0] != first[1]).all()  # And for each member.
    alike = first == first[:, :1]
    assert alike[:, 1:].all() if not per_example else not alike[:, 1:].any()


@each_kind
def test_points_are_batch_ensemble(kind):
    point = MeanFieldNormal(
        is_singular=True, loc_initializer=batch_ensemble_initializer(-0.5)
    )
    layer = made(kind, alpha_posterior_fn=point, gamma_posterior_fn=point)
    r, s = (numpy(w.posterior.mean()) for w in (layer.alpha, layer.gamma))
    twin = with_points(kind, layer, r, s)
    x = inputs(kind)
    np.testing.assert_allclose(numpy(layer(x)), numpy(twin(x)), **CLOSE)


def test_mean_and_variance_of_the_outputs():
    """Of a linear layer, over the draws of many equal rows."""
    rows = 20_000
    layer = made("dense", activation=None, ensemble_size=1)
    x = np.tile(inputs("dense", 1), (rows, 1))
    y = numpy(layer(x))
    (r, s), (a, b) = (
        [numpy(f(w.posterior))[0] for w in (layer.alpha, layer.gamma)]
        for f in (lambda q: q.mean(), lambda q: q.stddev())
    )
    kernel, bias = numpy(layer.kernel.value), numpy(layer.bias.value)[0]
    mean = (x[0] * r) @ kernel
    # Of a product z s of independent z and s: E[z]² v(s) + v(z) (E[s]² + v(s)).
    variance = (x[0] * a) ** 2 @ kernel**2
    variance = mean**2 * b**2 + variance * (s**2 + b**2)
    error = np.sqrt(variance / rows)
    assert (np.abs(y.mean(0) - mean * s - bias) < 5 * error).all()
    np.testing.assert_allclose(y.var(0), variance, rtol=0.1)


def normal_divergence(q, loc, scale):
    mean, std = numpy(q.mean()), numpy(q.stddev())
    term = np.log(scale / std) + (std**2 + (mean - loc) ** 2) / (2 * scale**2) - 0.5
    return term.sum()


def test_the_divergence_is_the_mean_of_the_members_and_counts_once():
    layer = made(
        "dense",
        alpha_prior_fn=NormalPrior(0.5, 2.0),
        gamma_prior_fn=NormalPrior(1.0, 0.1),
        num_examples=10,
    )
    x = inputs("dense")
    layer(x), layer(x)
    kl = normal_divergence(layer.alpha.posterior, 0.5, 2.0)
    kl += normal_divergence(layer.gamma.posterior, 1.0, 0.1)
    np.testing.assert_allclose(numpy(sum(layer.losses)), kl / M / 10, rtol=1e-5)
    layer.set_divergence_weight(0.5)
    np.testing.assert_allclose(numpy(sum(layer.losses)), kl / M / 20, rtol=1e-5)
    scale_divergence(layer, 20)
    np.testing.assert_allclose(numpy(sum(layer.losses)), kl / M / 40, rtol=1e-5)


def test_the_divergence_from_a_cauchy_prior_by_one_draw():
    none = {"gamma_prior_fn": None}
    layer = made("dense", alpha_prior_fn=CauchyPrior(0.5, 2.0), **none)
    found = again(layer, lambda: numpy(sum(layer.losses)))
    q = layer.alpha.posterior
    r = numpy(q.sample(layer.seed_generator))
    z = (r - numpy(q.mean())) / numpy(q.stddev())
    of_q = -0.5 * z**2 - np.log(numpy(q.stddev()) * np.sqrt(2 * np.pi))
    of_p = -np.log(np.pi * 2 * (1 + ((r - 0.5) / 2) ** 2))
    np.testing.assert_allclose(found, (of_q - of_p).sum() / M, rtol=1e-5)


def test_every_parameter_learns_and_members_by_themselves():
    layer, x = made("conv"), inputs("conv")
    names = [v.name for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]

    def loss(*weights):
        y, _ = layer.stateless_call(weights, others, x)
        return ops.sum(ops.square(y[B : 2 * B]))

    found = gradients(loss, *[numpy(v).astype(DTYPE) for v in layer.trainable_weights])
    for name, gradient in zip(names, found, strict=True):
        if name == "kernel":
            assert (gradient != 0).all()
        else:
            moved = (gradient != 0).reshape(M, -1)
            np.testing.assert_array_equal(moved.all(1), [False, True, False])
            np.testing.assert_array_equal(moved.any(1), [False, True, False])


@each_kind
@per_example
def test_predicts_by_the_means_of_the_posteriors(kind, per_example):
    layer, x = made(kind, per_example=per_example), inputs(kind)
    r, s = (numpy(w.posterior.mean()) for w in (layer.alpha, layer.gamma))
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=DTYPE), layer])
    y = numpy(PosteriorMean(model, dtype=DTYPE)(x))
    np.testing.assert_allclose(y, numpy(with_points(kind, layer, r, s)(x)), **CLOSE)


@each_kind
def test_a_member_is_the_plain_layer_at_the_means(kind):
    layer, x = made(kind), inputs(kind)
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=DTYPE), layer])
    expected = numpy(PosteriorMean(model, dtype=DTYPE)(x)).reshape(M, -1)
    for m in range(M):
        own = numpy(layer.member(m)(x[m * B : (m + 1) * B]))
        np.testing.assert_allclose(own.ravel(), expected[m], **CLOSE)


@pytest.mark.parametrize("kind", ["dense", "conv"])
@per_example
def test_samples_of_the_posteriors_are_functions_of_members(kind, per_example):
    layer, x, k = made(kind, per_example=per_example), inputs(kind, B), 4
    tiled = [TileMembers(M, dtype=DTYPE), layer]
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=DTYPE), *tiled])
    y = numpy(PosteriorSamples(model, k, seed=1, dtype=DTYPE)(x))
    assert y.shape[:2] == (M * B, k)
    weights = (layer.alpha, layer.gamma)
    r, s = (
        numpy(w.posterior.sample(nth_seed(seed_pair(1), i), k))
        for i, w in enumerate(weights)
    )
    for i in range(k):
        own = with_points(kind, layer, r[i], s[i])(np.concatenate([x] * M))
        np.testing.assert_allclose(y[:, i], numpy(own), **CLOSE)


def test_rows_that_do_not_split():
    message = f"ensemble_size={M}. Received: a batch of 7 rows"
    for kind in ("dense", "conv"):
        layer = made(kind)
        for x in (inputs(kind, 7), keras.Input(KINDS[kind][3], batch_size=7)):
            with pytest.raises(ValueError, match=message):
                layer(x)


@pytest.mark.tensorflow
@per_example
def test_rows_that_do_not_split_at_run_time(per_example):
    import tensorflow as tf

    layer = made("dense", per_example=per_example)
    call = tf.function(layer, input_signature=[tf.TensorSpec((None, 5), DTYPE)])
    assert call(inputs("dense")).shape == (M * B, 4)
    for rows in (1, 2, 7):
        with pytest.raises(tf.errors.InvalidArgumentError):
            call(inputs("dense", rows))


@pytest.mark.tensorflow
def test_takes_distributions_of_tfp():
    import tensorflow as tf
    import tensorflow_probability as tfp

    def cauchy(dtype, shape, name, trainable, add_variable_fn):
        loc = add_variable_fn(name=f"{name}_loc", shape=shape, initializer="ones")
        loc = tfp.util.DeferredTensor(loc, lambda x: tf.cast(x, dtype))
        entries = tfp.distributions.Cauchy(loc, tf.constant(0.01, dtype))
        return tfp.distributions.Independent(entries, len(shape))

    layer = made(
        "dense", alpha_posterior_fn=cauchy, alpha_prior_fn=CauchyPrior(1.0, 0.01)
    )
    x = inputs("dense")
    y = again(layer, lambda: numpy(layer(x)))
    r, s = (
        numpy(w.posterior.sample(layer.seed_generator, B))
        for w in (layer.alpha, layer.gamma)
    )
    r, s = (np.moveaxis(d, 1, 0).reshape(M * B, -1) for d in (r, s))
    np.testing.assert_allclose(y, numpy(with_points("dense", layer, r, s)(x)), **CLOSE)
    # Posterior and prior are one: nothing is divergent, whatever is drawn.
    np.testing.assert_allclose(numpy(layer.losses[0]), 0, atol=1e-6)


@pytest.mark.jax
def test_functions_that_are_not_kzoos_are_refused_on_jax():
    for name in ("alpha_posterior_fn", "gamma_prior_fn"):
        with pytest.raises(ValueError, match=f"`{name}` to be one of kzoo's"):
            DenseRank1(3, **{name: lambda *args: None})


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"units": 0}, "units=0"),
        ({"ensemble_size": 0}, "ensemble_size=0"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"alpha_posterior_fn": CauchyPrior()}, "alpha_posterior_fn=<"),
        ({"gamma_posterior_fn": None}, "gamma_posterior_fn=None"),
        ({"gamma_prior_fn": MeanFieldNormal(is_singular=True)}, "with a density"),
        ({"alpha_divergence_fn": 1.0}, "alpha_divergence_fn=1.0"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DenseRank1(**{"units": 3, **kwargs}).build((None, 5))


def test_what_posteriors_say_is_no_argument():
    for name in ("rank", "alpha_initializer", "gamma_initializer"):
        with pytest.raises(TypeError, match=name):
            DenseRank1(3, **{name: 1})
        assert name not in DenseRank1(3).get_config()
    assert DenseRank1(3).alpha_divergence_fn is kl_divergence
