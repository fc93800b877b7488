import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from kzoo.layers import (
    EinsumDenseFlipout,
    MeanFieldNormal,
    MultiHeadAttentionFlipout,
    MultiHeadAttentionLocalReparameterization,
    MultiHeadAttentionReparameterization,
    PosteriorMean,
    PosteriorSamples,
    scale_divergence,
)

LAYERS = [
    MultiHeadAttentionFlipout,
    MultiHeadAttentionReparameterization,
    MultiHeadAttentionLocalReparameterization,
]
DTYPE = "float64" if keras.backend.backend() == "tensorflow" else "float32"
TOL = 1e-8 if DTYPE == "float64" else 1e-4
POINT = MeanFieldNormal(is_singular=True)
rng = np.random.default_rng(0)


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def sequences(*shape):
    return rng.normal(size=shape).astype(DTYPE)


def projections(layer):
    names = ("query", "key", "value", "gate", "output")
    return [
        getattr(layer, f"_{name}_dense")
        for name in names
        if hasattr(layer, f"_{name}_dense")
    ]


def copy_means(ours, plain):
    """Gives a built layer the plain one's weights, which are drawn first."""
    for one, other in zip(projections(ours), projections(plain), strict=True):
        for weight in other.weights:
            weight.assign(rng.normal(size=weight.shape))
        one.kernel.variables[0].assign(other.kernel)
        if other.bias is not None:
            one.bias.variables[0].assign(other.bias)


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_contract(layer):
    kwargs = {
        "num_heads": 2,
        "key_dim": 2,
        "value_dim": 1,
        "dropout": 0.25,
        "num_examples": 50,
        "seed": 7,
    }
    check_layer(layer, kwargs, ((4, 2, 2), (4, 3, 2)))


ARGUMENTS = [
    ({}, {}, (3, 4, 5)),
    ({"value_dim": 3, "output_shape": (2, 4)}, {"use_causal_mask": True}, (3, 4, 5)),
    ({"use_gate": True, "sliding_window": 2}, {"return_attention_scores": True}, None),
    ({"attention_axes": 2, "output_shape": 2}, {}, (3, 2, 4, 5)),
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("arguments, call, shape", ARGUMENTS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_point_is_the_plain_layer(layer, arguments, call, shape, use_bias):
    point = {"kernel_posterior_fn": POINT}
    point["bias_posterior_fn"] = POINT if use_bias else None
    layer = layer(2, 3, dtype=DTYPE, **point, **arguments)
    plain = keras.layers.MultiHeadAttention(
        2, 3, use_bias=use_bias, dtype=DTYPE, **arguments
    )
    query = sequences(*(shape or (3, 4, 5)))
    value = sequences(*shape[:-1], 2) if shape else sequences(3, 6, 4)
    key = sequences(*value.shape[:-1], 3)
    for attention in (layer, plain):
        attention.build(query.shape, value.shape, key.shape)
    copy_means(layer, plain)
    expected = keras.tree.flatten(plain(query, value, key, **call))
    found = keras.tree.flatten(layer(query, value, key, **call))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(numpy(ours), numpy(theirs), TOL, TOL)
    shapes = query.shape, value.shape, key.shape
    assert layer.compute_output_shape(*shapes) == tuple(found[0].shape)


def test_masks_are_those_of_the_plain_layer():
    ids = np.array([[1, 2, 3, 0], [2, 1, 0, 0]])
    embedding = keras.layers.Embedding(4, 5, mask_zero=True, dtype=DTYPE)
    layer = MultiHeadAttentionFlipout(2, 3, kernel_posterior_fn=POINT, dtype=DTYPE)
    plain = keras.layers.MultiHeadAttention(2, 3, dtype=DTYPE)
    for attention in (layer, plain):
        attention.build((2, 4, 5), (2, 4, 5))
    copy_means(layer, plain)

    def answer(attention, **kwargs):
        x = embedding(ids)
        y = attention(x, x, **kwargs)
        return numpy(y), numpy(y._keras_mask)

    mask = rng.integers(2, size=(2, 4, 4)).astype(bool)
    for call in ({}, {"attention_mask": mask, "use_causal_mask": True}):
        pairs = zip(answer(layer, **call), answer(plain, **call), strict=True)
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, TOL, TOL)
    assert not np.allclose(answer(layer)[0], answer(layer, attention_mask=mask)[0])


@pytest.mark.parametrize(
    "axes, query, value",
    [(None, (2, 3, 5), (2, 6, 5)), (2, (2, 3, 4, 5), (2, 3, 6, 5))],
)
def test_symbolic_scores_have_the_shape_of_real_ones(axes, query, value):
    layer = MultiHeadAttentionFlipout(2, 3, attention_axes=axes)
    given = sequences(*query).astype("float32"), sequences(*value).astype("float32")
    real = layer(*given, return_attention_scores=True)
    symbols = [keras.Input(shape[1:]) for shape in (query, value)]
    symbolic = layer(*symbols, return_attention_scores=True)
    for one, other in zip(symbolic, real, strict=True):
        assert (2, *one.shape[1:]) == tuple(other.shape)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_projections_are_einsum_layers_that_draw(layer):
    """The output is plain attention of what the projections give."""
    layer = layer(2, 3, value_dim=2, seed=0, dtype=DTYPE)
    query, value = sequences(4, 3, 5), sequences(4, 6, 5)
    layer.build(query.shape, value.shape)
    states = [ops.convert_to_numpy(p.seed_generator.state) for p in projections(layer)]
    y = numpy(layer(query, value))
    for projection, state in zip(projections(layer), states, strict=True):
        projection.seed_generator.state.assign(state)
    q = numpy(layer.query_dense(query))
    k, v = numpy(layer.key_dense(value)), numpy(layer.value_dense(value))
    scores = np.exp(np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(3))
    scores /= scores.sum(-1, keepdims=True)
    heads = np.einsum("bnts,bsnh->btnh", scores, v).astype(DTYPE)
    np.testing.assert_allclose(y, numpy(layer.output_dense(heads)), TOL, TOL)
    # They draw, and from seeds of their own.
    assert not np.allclose(y, numpy(layer(query, value)))
    seeds = {projection.seed for projection in projections(layer)}
    assert len(seeds) == 4 and None not in seeds


@pytest.mark.slow
def test_mean_variance_and_covariance_of_examples():
    """Of V, and of y where the weights of attention are fixed: T = 1 attends to it."""
    layer = MultiHeadAttentionFlipout(
        1, 2, seed=1, bias_posterior_fn=None, output_shape=2, dtype=DTYPE
    )
    x = np.repeat(sequences(1, 1, 3), 2, 0)
    layer.build(x.shape, x.shape)
    for projection in projections(layer):
        scale = projection.kernel.variables[1]
        scale.assign(rng.normal(size=scale.shape))
    v, o = (p.kernel_posterior for p in (layer.value_dense, layer.output_dense))
    draws = 1500
    model_input = keras.Input((1, 3), dtype=DTYPE)
    model = keras.Model(model_input, layer(model_input, model_input))
    # Each batch of two examples is a draw of its own.
    y = model.predict(np.tile(x, (draws, 1, 1)), batch_size=2, verbose=0)
    y = y.astype("float64").reshape(draws, 2, 2)
    x = x[0, 0].astype("float64")
    mean_v, mean_o = numpy(v.mean())[:, 0], numpy(o.mean())[0]
    var_v, var_o = numpy(v.stddev())[:, 0] ** 2, numpy(o.stddev())[0] ** 2
    # y_d = Σ_h V_h W_hd, with V and W independent, the V_h of one example too.
    mean, square = x @ mean_v, (x @ mean_v) ** 2 + x**2 @ var_v
    expected = mean @ mean_o
    variance = square @ (var_o + mean_o**2) - mean**2 @ mean_o**2
    assert (np.abs(y.mean(0) - expected) < 5 * np.sqrt(variance / draws)).all()
    np.testing.assert_allclose(y.var(0), np.stack([variance] * 2), rtol=0.25)
    z = (y - expected) / np.sqrt(variance)
    assert (np.abs((z[:, 0] * z[:, 1]).mean(0)) < 0.15).all()


def test_the_divergence_of_each_projection_is_counted_once():
    layer = MultiHeadAttentionFlipout(2, 3, num_examples=10, use_gate=True)
    x = sequences(2, 3, 4).astype("float32")
    layer(x, x), layer(x, x)

    def divergence(projection):
        q = projection.kernel_posterior
        mean, std = numpy(q.mean()), numpy(q.stddev())
        return 0.5 * (std**2 + mean**2 - 1 - 2 * np.log(std)).sum()

    whole = sum(map(divergence, projections(layer)))
    assert len(projections(layer)) == 5
    np.testing.assert_allclose(numpy(sum(layer.losses)), whole / 10, 1e-5)
    scale_divergence(layer, 20)
    np.testing.assert_allclose(numpy(sum(layer.losses)), whole / 20, 1e-5)
    for projection in projections(layer):
        projection.set_divergence_weight(0.5)
    np.testing.assert_allclose(numpy(sum(layer.losses)), whole / 40, 1e-5)
    assert layer.get_config()["num_examples"] == 20


def test_the_scale_can_be_set_before_it_is_built():
    layer = MultiHeadAttentionFlipout(2, 3)
    scale_divergence(layer, 20)
    assert all(p.num_examples == 20 for p in projections(layer))
    assert all(isinstance(p, EinsumDenseFlipout) for p in projections(layer))


@pytest.mark.parametrize("jit", [False, True])
def test_a_sample_of_the_posterior_is_one_plain_layer(jit):
    x = keras.Input((3, 2))
    layer = MultiHeadAttentionFlipout(2, 2, seed=0)
    model = keras.Model(x, layer(x, x))
    rows = rng.normal(size=(2, 3, 2)).astype("float32")
    samples = PosteriorSamples(model, 4, seed=0)
    samples.compile(jit_compile=jit)
    y = samples.predict(np.concatenate([rows, rows[:, ::-1]]), verbose=0)
    assert y.shape == (4, 4, 3, 2)
    # One draw at all positions: attention does not know their order.
    np.testing.assert_allclose(y[2:], y[:2, :, ::-1], 1e-4, 1e-5)
    assert not np.allclose(y[:, 0], y[:, 1])
    mean = PosteriorMean(model).predict(rows, verbose=0)
    np.testing.assert_array_equal(mean, PosteriorMean(model).predict(rows, verbose=0))


def test_dropout():
    """It drops what Keras's drops in the mean, and only in training."""
    layer = MultiHeadAttentionFlipout(
        1, 2, dropout=0.5, kernel_posterior_fn=POINT, seed=0
    )
    x = rng.normal(size=(1, 3, 2)).astype("float32")
    still = numpy(layer(x, x))
    np.testing.assert_array_equal(numpy(layer(x, x, training=False)), still)
    x = np.repeat(x, 400, 0)
    y = numpy(layer(x, x, training=True))
    assert (np.abs(y.mean(0) - still[0]) < 5 * y.std(0) / 20).all()
    assert (y.std(0) > 0).all()
    names = [x.name for x in layer._flatten_layers()]
    assert names.count("dropout") == 1


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"use_bias": False}, "use_bias=False"),
        ({"kernel_initializer": "zeros"}, "kernel_initializer='zeros'"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"seed": "x"}, "seed='x'"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=f"Received: {message}"):
        MultiHeadAttentionFlipout(**{"num_heads": 2, "key_dim": 3, **kwargs})


def test_refuses_shapes():
    layer = MultiHeadAttentionFlipout(2, 3)
    with pytest.raises(ValueError, match="Received: value of shape"):
        layer.build((2, 3, 4), (2, 5, 4), (2, 6, 4))
