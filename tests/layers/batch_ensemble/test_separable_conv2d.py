import keras
import numpy as np
import pytest

from harness import check_layer
from harness.members import (
    DTYPE,
    TOL,
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
from kzoo.layers import (
    Conv2DBatchEnsemble,
    DepthwiseConv2DBatchEnsemble,
    SeparableConv2DBatchEnsemble,
)

IN, D, FILTERS = 3, 2, 4
SHAPE = (2 * M, 5, 4, IN)


def make(**kwargs):
    kwargs = {"ensemble_size": M, "depth_multiplier": D, "dtype": DTYPE, **kwargs}
    return SeparableConv2DBatchEnsemble(FILTERS, (3, 2), **kwargs)


def plain(**kwargs):
    return keras.layers.SeparableConv2D(
        FILTERS, (3, 2), depth_multiplier=D, dtype=DTYPE, **kwargs
    )


def scaled(shared, r, s):
    """r on the depthwise kernel's channels, s on the pointwise kernel's filters."""
    depthwise, pointwise = shared
    return [depthwise * r[:, None], pointwise * s]


@pytest.mark.slow
def test_contract():
    check_layer(
        SeparableConv2DBatchEnsemble,
        {
            "filters": 3,
            "kernel_size": (3, 2),
            "ensemble_size": 2,
            "padding": "same",
            "depth_multiplier": 2,
            "pointwise_initializer": "he_normal",
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
    check_ones(make(), plain(), normal(*SHAPE), IN + 2 * FILTERS)


def test_rank_one_is_rank_k_with_zeros():
    one, three = randomized(make(), SHAPE), randomized(make(rank=3), SHAPE)
    check_rank(one, three, normal(*SHAPE))


def test_is_a_depthwise_layer_before_one_with_a_window_of_one():
    """Whose fast weights between them are ones."""
    layer = randomized(make(), SHAPE)
    depthwise = DepthwiseConv2DBatchEnsemble(
        (3, 2), ensemble_size=M, depth_multiplier=D, use_bias=False, dtype=DTYPE
    )
    pointwise = Conv2DBatchEnsemble(FILTERS, 1, ensemble_size=M, dtype=DTYPE)
    depthwise.build(SHAPE)
    pointwise.build((2 * M, 3, 3, IN * D))
    depthwise.kernel.assign(layer.depthwise_kernel)
    depthwise.alpha.assign(layer.alpha)
    pointwise.kernel.assign(layer.pointwise_kernel)
    pointwise.gamma.assign(layer.gamma)
    pointwise.bias.assign(layer.bias)
    x = normal(*SHAPE)
    expected = values(pointwise(depthwise(x)))
    np.testing.assert_allclose(values(layer(x)), expected, TOL, TOL)


@pytest.mark.parametrize(
    "name", ("filters", "depth_multiplier", "rank", "ensemble_size")
)
def test_bad_sizes(name):
    with pytest.raises(ValueError, match=f"Received: {name}=0"):
        SeparableConv2DBatchEnsemble(**{"filters": 3, "kernel_size": 3, name: 0})
