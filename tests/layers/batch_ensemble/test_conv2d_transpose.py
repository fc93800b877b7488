import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from harness.members import (
    DTYPE,
    M,
    check_equal,
    check_isolated,
    check_ones,
    check_rank,
    normal,
    randomized,
    values,
    written_out,
)
from kzoo.layers import Conv2DTransposeBatchEnsemble

IN, FILTERS = 3, 4
SHAPE = (2 * M, 4, 3, IN)


def make(**kwargs):
    kwargs = {"ensemble_size": M, "dtype": DTYPE, **kwargs}
    return Conv2DTransposeBatchEnsemble(FILTERS, (3, 2), **kwargs)


def plain(**kwargs):
    return keras.layers.Conv2DTranspose(FILTERS, (3, 2), dtype=DTYPE, **kwargs)


def scaled(shared, r, s):
    """W ∘ (s rᵀ): the kernel of a transposed convolution has its outputs first."""
    return [shared[0] * s[:, None] * r]


@pytest.mark.slow
def test_contract():
    check_layer(
        Conv2DTransposeBatchEnsemble,
        {
            "filters": 2,
            "kernel_size": (3, 2),
            "ensemble_size": 2,
            "strides": 2,
            "padding": "same",
            "output_padding": 1,
        },
        (4, 2, 3, 2),
    )


@pytest.mark.parametrize(
    "geometry",
    ({"strides": 2, "output_padding": 1}, {"strides": (1, 2), "use_bias": False}),
    ids=str,
)
def test_equals_explicit_kernels(geometry):
    simple = plain(padding="same", **geometry)
    simple.build(SHAPE)
    layer = make(rank=2, padding="same", activation="tanh", **geometry)
    randomized(layer, SHAPE)
    check_equal(layer, written_out(layer, simple, scaled), normal(*SHAPE))
    check_isolated(layer, normal(*SHAPE), normal(*SHAPE, seed=1))


def test_ones_are_the_plain_layer():
    check_ones(make(), plain(), normal(*SHAPE), IN + 2 * FILTERS)


def test_rank_one_is_rank_k_with_zeros():
    one, three = randomized(make(), SHAPE), randomized(make(rank=3), SHAPE)
    check_rank(one, three, normal(*SHAPE))


@pytest.mark.jax  # TensorFlow has no kernel of it for CPUs.
def test_channels_first_equals_channels_last():
    last = randomized(make(rank=2, strides=2), SHAPE)
    first = make(rank=2, strides=2, data_format="channels_first")
    x = normal(*SHAPE)
    turned = x.transpose(0, 3, 1, 2)
    first.build(turned.shape)
    first.set_weights(last.get_weights())
    output = values(first(turned))
    assert output.shape == first.compute_output_shape(turned.shape)
    np.testing.assert_allclose(
        output, values(ops.transpose(last(x), (0, 3, 1, 2))), 1e-4, 1e-4
    )


@pytest.mark.parametrize("name", ("filters", "rank", "ensemble_size"))
def test_bad_sizes(name):
    with pytest.raises(ValueError, match=f"Received: {name}=0"):
        Conv2DTransposeBatchEnsemble(**{"filters": 3, "kernel_size": 3, name: 0})
