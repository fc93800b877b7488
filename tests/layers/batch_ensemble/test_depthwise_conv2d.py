import keras
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
    written_out,
)
from kzoo.layers import DepthwiseConv2DBatchEnsemble

IN, D = 3, 2
SHAPE = (2 * M, 5, 4, IN)


def make(**kwargs):
    kwargs = {"ensemble_size": M, "depth_multiplier": D, "dtype": DTYPE, **kwargs}
    return DepthwiseConv2DBatchEnsemble((3, 2), **kwargs)


def plain(**kwargs):
    return keras.layers.DepthwiseConv2D(
        (3, 2), depth_multiplier=D, dtype=DTYPE, **kwargs
    )


def scaled(shared, r, s):
    """W_cd r_c s_cd: the output channels c * D + d are of the input channel c."""
    return [shared[0] * r[:, None] * ops.reshape(s, (IN, D))]


@pytest.mark.slow
def test_contract():
    check_layer(
        DepthwiseConv2DBatchEnsemble,
        {
            "kernel_size": (3, 2),
            "ensemble_size": 2,
            "strides": 2,
            "padding": "same",
            "depth_multiplier": 2,
            "depthwise_initializer": "he_normal",
        },
        (4, 4, 3, 2),
    )


@pytest.mark.parametrize(
    "geometry",
    ({"strides": 2, "padding": "same"}, {"dilation_rate": 2, "use_bias": False}),
    ids=str,
)
def test_equals_explicit_kernels(geometry):
    simple = plain(**geometry)
    simple.build(SHAPE)
    layer = randomized(make(rank=2, activation="tanh", **geometry), SHAPE)
    check_equal(layer, written_out(layer, simple, scaled), normal(*SHAPE))
    check_isolated(layer, normal(*SHAPE), normal(*SHAPE, seed=1))


def test_ones_are_the_plain_layer():
    check_ones(make(), plain(), normal(*SHAPE), IN + 2 * IN * D)


def test_rank_one_is_rank_k_with_zeros():
    one, three = randomized(make(), SHAPE), randomized(make(rank=3), SHAPE)
    check_rank(one, three, normal(*SHAPE))


@pytest.mark.parametrize("name", ("depth_multiplier", "rank", "ensemble_size"))
def test_bad_sizes(name):
    with pytest.raises(ValueError, match=f"Received: {name}=0"):
        DepthwiseConv2DBatchEnsemble(3, **{name: 0})
