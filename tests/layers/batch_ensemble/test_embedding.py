import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from harness.backends import gradients
from harness.members import (
    DTYPE,
    TOL,
    M,
    check_equal,
    check_isolated,
    check_ones,
    check_rank,
    randomized,
    values,
    written_out,
)
from kzoo.layers import EmbeddingBatchEnsemble

V, D = 5, 3
SHAPE = (2 * M, 4)


def make(**kwargs):
    kwargs = {"ensemble_size": M, "dtype": DTYPE, **kwargs}
    return EmbeddingBatchEnsemble(V, D, **kwargs)


def ids(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, V, shape).astype("int32")


def scaled(shared, r, s):
    """W ∘ (r sᵀ)."""
    return [shared[0] * r[:, None] * s]


@pytest.mark.slow
def test_contract():
    check_layer(
        EmbeddingBatchEnsemble,
        {
            "input_dim": 4,
            "output_dim": 3,
            "rank": 2,
            "ensemble_size": 2,
            "alpha_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=1),
            "gamma_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=2),
            "embeddings_initializer": "normal",
            "embeddings_regularizer": "l2",
            "embeddings_constraint": "max_norm",
            "mask_zero": True,
        },
        (4, 3),
        input_dtype="int32",
    )


@pytest.mark.parametrize("rank", (1, 2))
def test_equals_explicit_tables(rank):
    plain = keras.layers.Embedding(V, D, dtype=DTYPE)
    plain.build()
    layer = randomized(make(rank=rank), SHAPE)
    check_equal(layer, written_out(layer, plain, scaled), ids())
    # Each id but in other rows: whatever a member looks up changes its numbers.
    check_isolated(layer, ids(), (ids() + 1) % V)


def test_ones_are_the_plain_layer():
    check_ones(make(), keras.layers.Embedding(V, D, dtype=DTYPE), ids(), V + D)


def test_rank_one_is_rank_k_with_zeros():
    one, three = randomized(make(), SHAPE), randomized(make(rank=3), SHAPE)
    check_rank(one, three, ids())


@pytest.mark.parametrize("shape", ((2 * M,), (M, 2, 3), (0, 3)))
def test_any_number_of_axes(shape):
    layer, x = randomized(make(), shape), ids(shape=shape)
    table = values(layer.embeddings) * values(layer.alpha)[..., None]
    table = table * values(layer.gamma)[:, None]
    expected = table[np.arange(M)[:, None], x.reshape(M, -1)].reshape(*shape, D)
    np.testing.assert_allclose(values(layer(x)), expected, TOL, TOL)


@pytest.mark.parametrize("dtype", ("float32", "uint8", "int64"))
def test_ids_of_any_dtype(dtype):
    layer, x = randomized(make(), SHAPE), ids()
    expected = values(layer(x))
    np.testing.assert_array_equal(values(layer(x.astype(dtype))), expected)


def test_negative_ids_stay_with_their_member():
    """The plain layer counts them from the end; so r is that of the member's last."""
    layer = randomized(make(), SHAPE)
    last = values(layer(np.full(SHAPE, V - 1)))
    np.testing.assert_array_equal(values(layer(np.full(SHAPE, -1))), last)


def test_ids_keep_their_digits_in_mixed_precision():
    layer = EmbeddingBatchEnsemble(5000, 1, ensemble_size=1, dtype="mixed_bfloat16")
    layer.build((None,))
    layer.embeddings.assign(np.arange(5000)[:, None] % 2)
    layer.alpha.assign(np.arange(5000)[None] % 3)
    x = np.arange(4000, 5000)
    for given in (x, x.astype("float32")):
        output = ops.cast(layer(given), "float32")
        np.testing.assert_array_equal(values(output)[:, 0], x % 2 * (x % 3))


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_gradients_of_many_ids_in_half_precision(dtype):
    """A sum of 20,000 equal terms stops growing if it is kept in half precision."""
    layer = EmbeddingBatchEnsemble(1, 1, ensemble_size=1, dtype=f"mixed_{dtype}")
    layer.build((None,))
    layer.embeddings.assign([[1 / 32]])
    x = np.zeros(20_000, "int32")
    ones = np.ones((1, 1), "float32")

    def loss(alpha, gamma):
        y = layer.stateless_call([alpha, gamma, ones / 32], [], x)[0]
        return ops.sum(ops.cast(y, "float32"))

    for gradient in gradients(loss, ones, ones):
        np.testing.assert_allclose(gradient, [[625]], rtol=0.01)


def test_mask():
    layer = randomized(make(mask_zero=True), SHAPE)
    np.testing.assert_array_equal(values(layer(ids())._keras_mask), ids() != 0)
    assert not make().supports_masking
    assert make().compute_mask(ids()) is None


@pytest.mark.parametrize("name", ("input_dim", "output_dim", "rank", "ensemble_size"))
@pytest.mark.parametrize("value", (0, 1.5, True))
def test_bad_sizes(name, value):
    with pytest.raises(ValueError, match=f"Received: {name}={value}"):
        EmbeddingBatchEnsemble(**{"input_dim": 3, "output_dim": 2, name: value})


def test_rows_that_do_not_split():
    message = f"ensemble_size={M}. Received: a batch of 7 rows"
    with pytest.raises(ValueError, match=message):
        make()(np.zeros((7, 2), "int32"))
