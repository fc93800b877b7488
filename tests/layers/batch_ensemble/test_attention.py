import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from harness.members import (
    DTYPE,
    TOL,
    M,
    check_equal,
    check_isolated,
    normal,
    quick,
    values,
)
from kzoo.layers import MultiHeadAttentionBatchEnsemble

HEADS, SIZE = 2, 3


def projections(layer):
    names = ("query", "key", "value", "gate", "output")
    found = [getattr(layer, f"_{name}_dense", None) for name in names]
    return [projection for projection in found if projection is not None]


def self_attention(base):
    """Attention of one tensor to itself."""

    class SelfAttention(base):
        def build(self, shape):
            super().build(shape, shape)

        def call(self, x, **kwargs):
            return super().call(x, x, **kwargs)

        def compute_output_shape(self, shape):
            return super().compute_output_shape(shape, shape)

    return SelfAttention


Members = self_attention(MultiHeadAttentionBatchEnsemble)
Plain = self_attention(keras.layers.MultiHeadAttention)


def make(cls=MultiHeadAttentionBatchEnsemble, **kwargs):
    return cls(HEADS, SIZE, **{"ensemble_size": M, "dtype": DTYPE, **kwargs})


def plain(cls=keras.layers.MultiHeadAttention, **kwargs):
    return cls(HEADS, SIZE, **{"dtype": DTYPE, **kwargs})


def randomize(layer):
    for i, variable in enumerate(layer.weights):
        variable.assign(normal(*variable.shape, seed=i + 1))


def kernel(projection, shared, alpha, gamma, m):
    """W ∘ Σ_k (r_mk s_mk) of a projection, whose axes are those of r, then of s."""
    if projection.rank == 1:
        alpha, gamma = alpha[None], gamma[None]
    return shared * sum(
        ops.tensordot(r, s, axes=0)
        for r, s in zip(alpha[:, m], gamma[:, m], strict=True)
    )


def written_out(layer, simple):
    """M plain layers, as a function of the input and of the trainable weights."""
    of = {id(v): i for i, v in enumerate(layer.trainable_variables)}

    def function(x, *weights):
        outputs = []
        for m, rows in enumerate(ops.split(x, M)):
            own = {}
            for mine, its in zip(projections(layer), projections(simple), strict=True):
                w, r, s = (
                    weights[of[id(v)]] for v in (mine.kernel, mine.alpha, mine.gamma)
                )
                own[id(its.kernel)] = kernel(mine, w, r, s, m)
                if mine.bias is not None:
                    own[id(its.bias)] = weights[of[id(mine.bias)]][m]
            given = [own[id(v)] for v in simple.trainable_variables]
            outputs.append(simple.stateless_call(given, [], rows)[0])
        return ops.concatenate(outputs)

    return quick(function)


def plain_copies(layer, *shapes, **kwargs):
    """A plain layer for each member, with its weights."""
    copies = []
    for m in range(M):
        copies.append(plain(**kwargs))
        copies[m].build(*shapes)
        for mine, its in zip(projections(layer), projections(copies[m]), strict=True):
            fast = values(mine.alpha), values(mine.gamma)
            its.kernel.assign(kernel(mine, values(mine.kernel), *fast, m))
            if mine.bias is not None:
                its.bias.assign(values(mine.bias)[m])
    return copies


@pytest.mark.slow
def test_contract():
    check_layer(
        MultiHeadAttentionBatchEnsemble,
        {
            "num_heads": 2,
            "key_dim": 2,
            "ensemble_size": 2,
            "value_dim": 1,
            "dropout": 0.25,
            "alpha_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=1),
            "gamma_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=2),
            "kernel_regularizer": "l2",
            "seed": 7,
        },
        ((4, 2, 2), (4, 3, 2)),
    )


@pytest.mark.parametrize(
    "rank, arguments",
    [(1, {"use_gate": True}), (2, {"output_shape": (2, 4), "use_bias": False})],
)
def test_equals_explicit_kernels(rank, arguments):
    x = normal(2 * M, 4, 5)
    layer, simple = make(Members, rank=rank, **arguments), plain(Plain, **arguments)
    for attention in (layer, simple):
        attention.build(x.shape)
    randomize(layer)
    check_equal(layer, written_out(layer, simple), x)
    check_isolated(layer, x, normal(2 * M, 4, 5, seed=9))


CALLS = [
    ({"sliding_window": 2}, {"use_causal_mask": True}, (2 * M, 4, 5), (2 * M, 4, 3)),
    ({"value_dim": 2}, {"return_attention_scores": True}, (M, 4, 5), (M, 6, 3)),
    ({"attention_axes": 2, "output_shape": 2}, {}, (M, 2, 4, 5), (M, 2, 3, 5)),
]


@pytest.mark.parametrize("arguments, call, query, value", CALLS)
def test_calls_are_those_of_plain_layers(arguments, call, query, value):
    layer, x, y = make(**arguments), normal(*query), normal(*value, seed=1)
    layer.build(query, value)
    randomize(layer)
    found = keras.tree.flatten(layer(x, y, **call))
    assert layer.compute_output_shape(query, value) == tuple(found[0].shape)
    rows = len(x) // M
    for m, copy in enumerate(plain_copies(layer, query, value, **arguments)):
        part = slice(rows * m, rows * (m + 1))
        expected = keras.tree.flatten(copy(x[part], y[part], **call))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(values(one)[part], values(other), TOL, TOL)


def test_masks_are_those_of_plain_layers():
    ids = np.array([[1, 2, 3, 0], [2, 1, 0, 0], [3, 3, 1, 2]])
    embedding = keras.layers.Embedding(4, 5, mask_zero=True, dtype=DTYPE)
    mask = np.random.default_rng(0).integers(2, size=(M, 4, 4)).astype(bool)
    layer = make()
    layer.build((M, 4, 5), (M, 4, 5))
    randomize(layer)
    x = embedding(ids)
    output = layer(x, x, attention_mask=mask)
    np.testing.assert_array_equal(values(output._keras_mask), ids > 0)
    for m, copy in enumerate(plain_copies(layer, (M, 4, 5), (M, 4, 5))):
        x = embedding(ids[m : m + 1])
        expected = values(copy(x, x, attention_mask=mask[m : m + 1]))
        np.testing.assert_allclose(values(output)[m : m + 1], expected, TOL, TOL)


def test_ones_are_the_plain_layer():
    x = normal(M, 4, 5)
    layer, simple = make(), plain()
    for attention in (layer, simple):
        attention.build(x.shape, x.shape)
    for mine, its in zip(projections(layer), projections(simple), strict=True):
        mine.kernel.assign(its.kernel)
    np.testing.assert_allclose(values(layer(x, x)), values(simple(x, x)), TOL, TOL)
    # Of each projection of the input 5 numbers r, 6 of s, 6 of b; of the output's 6, 5
    # and 5, in place of the plain layer's biases.
    own = 3 * (5 + 6 + 6) + 6 + 5 + 5
    plain_biases = 3 * 6 + 5
    assert layer.count_params() == simple.count_params() - plain_biases + M * own


def test_config_holds_what_projections_take():
    given = {
        "rank": 2,
        "ensemble_size": 3,
        "use_bias": False,
        "flash_attention": False,
        "activity_regularizer": "l2",
        "kernel_constraint": "non_neg",
        "output_shape": (2, 4),
        "use_gate": True,
    }
    layer = make(**given)
    config = layer.get_config()
    assert config["rank"] == 2 and config["ensemble_size"] == 3
    again = type(layer).from_config(config)
    assert again.get_config() == config
    for one, other in zip(projections(again), projections(layer), strict=True):
        assert one.get_config() == other.get_config()
        assert one.rank == 2 and one.ensemble_size == 3
        assert isinstance(one.activity_regularizer, keras.regularizers.L2)
    assert len(projections(again)) == 5


def test_projections_draw_their_own_kernels():
    layer = make(
        kernel_initializer=keras.initializers.RandomNormal(),
        alpha_initializer=keras.initializers.RandomNormal(),
    )
    layer.build((M, 4, 5), (M, 4, 5))
    query, key = layer.query_dense, layer.key_dense
    assert not np.allclose(values(query.kernel), values(key.kernel))
    assert not np.allclose(values(query.alpha), values(key.alpha))


def test_dropout():
    """In the mean what it is without, and only in training."""
    layer = MultiHeadAttentionBatchEnsemble(1, 2, ensemble_size=2, dropout=0.5, seed=0)
    x = np.repeat(normal(2, 3, 2).astype("float32"), 400, 0)
    layer.build(x.shape, x.shape)
    randomize(layer)
    still = values(layer(x, x)).reshape(2, 400, 3, 2)
    y = values(layer(x, x, training=True)).reshape(2, 400, 3, 2)
    assert (np.abs(y.mean(1) - still[:, 0]) < 5 * y.std(1) / 20).all()
    assert (y.std(1) > 0.1).all() and (still.std(1) < 1e-4).all()


@pytest.mark.parametrize(
    "name", ("num_heads", "key_dim", "value_dim", "rank", "ensemble_size")
)
def test_bad_sizes(name):
    given = {"num_heads": 2, "key_dim": 3, name: -1}
    with pytest.raises(ValueError, match=f"Received: {name}=-1"):
        MultiHeadAttentionBatchEnsemble(**given)


def test_refuses():
    with pytest.raises(ValueError, match="Received: value_dim=2, key_dim=3"):
        make(value_dim=2, flash_attention=True)
    with pytest.raises(ValueError, match="Received: seed='x'"):
        make(seed="x")
    message = f"ensemble_size={M}. Received: a batch of 7 rows"
    with pytest.raises(ValueError, match=message):
        make()(normal(7, 4, 5), normal(7, 4, 5))
    x = keras.Input((4, 5), batch_size=7)
    with pytest.raises(ValueError, match=message):
        make()(x, x)
