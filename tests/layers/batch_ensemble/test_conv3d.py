import keras
import pytest

from harness import check_layer
from harness.members import (
    DTYPE,
    M,
    check_equal,
    check_isolated,
    check_ones,
    normal,
    of_channels,
    randomized,
    written_out,
)
from kzoo.layers import Conv3DBatchEnsemble

SHAPE = (2 * M, 3, 2, 4, 2)


def make(**kwargs):
    kwargs = {"ensemble_size": M, "dtype": DTYPE, **kwargs}
    return Conv3DBatchEnsemble(4, (2, 1, 3), **kwargs)


def plain(**kwargs):
    return keras.layers.Conv3D(4, (2, 1, 3), dtype=DTYPE, **kwargs)


@pytest.mark.slow
def test_contract():
    check_layer(
        Conv3DBatchEnsemble,
        {"filters": 2, "kernel_size": (2, 1, 2), "ensemble_size": 2, "strides": 2},
        (4, 3, 2, 4, 2),
    )


@pytest.mark.parametrize("rank", (1, 2))
def test_equals_explicit_kernels(rank):
    geometry = {"padding": "same", "strides": (1, 2, 1), "groups": 2}
    x, simple = normal(*SHAPE), plain(**geometry)
    simple.build(SHAPE)
    layer = randomized(make(rank=rank, **geometry), SHAPE)
    check_equal(layer, written_out(layer, simple, of_channels), x)
    check_isolated(layer, x, normal(*SHAPE, seed=1))


def test_ones_are_the_plain_layer():
    check_ones(make(), plain(), normal(*SHAPE), 2 + 2 * 4)
