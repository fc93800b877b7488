import keras
import pytest

from harness import check_layer
from harness.members import (
    DTYPE,
    B,
    M,
    check_equal,
    check_isolated,
    check_ones,
    check_rank,
    normal,
    of_channels,
    randomized,
    written_out,
)
from kzoo.layers import Conv1DBatchEnsemble

IN, FILTERS = 4, 6
GEOMETRIES = (
    {"padding": "causal", "dilation_rate": 2},
    {"padding": "same", "strides": 2, "groups": 2, "use_bias": False},
    # TensorFlow has no kernel of it for CPUs.
    pytest.param({"data_format": "channels_first"}, marks=pytest.mark.jax),
)


def make(**kwargs):
    kwargs = {"ensemble_size": M, "dtype": DTYPE, **kwargs}
    return Conv1DBatchEnsemble(FILTERS, 3, **kwargs)


def plain(**kwargs):
    return keras.layers.Conv1D(FILTERS, 3, dtype=DTYPE, **kwargs)


def inputs(members=M, data_format=None, seed=0, **kwargs):
    first = data_format == "channels_first"
    return normal(members * B, *((IN, 7) if first else (7, IN)), seed=seed)


@pytest.mark.slow
def test_contract():
    check_layer(
        Conv1DBatchEnsemble,
        {
            "filters": 4,
            "kernel_size": 2,
            "rank": 2,
            "ensemble_size": 3,
            "alpha_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=1),
            "gamma_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=2),
            "padding": "causal",
            "dilation_rate": 2,
            "groups": 2,
            "activation": "tanh",
        },
        (6, 5, 2),
    )


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_equals_explicit_kernels(geometry):
    x, simple = inputs(**geometry), plain(**geometry)
    simple.build(x.shape)
    layer = randomized(make(rank=2, activation="tanh", **geometry), x.shape)
    check_equal(layer, written_out(layer, simple, of_channels), x)


def test_members_are_isolated():
    layer = randomized(make(), (M * B, 7, IN))
    check_isolated(layer, inputs(), inputs(seed=1))


@pytest.mark.parametrize("members", (1, M))
def test_ones_are_the_plain_layer(members):
    check_ones(make(ensemble_size=members), plain(), inputs(members), IN + 2 * FILTERS)


def test_rank_one_is_rank_k_with_zeros():
    shape = (M * B, 7, IN)
    one, three = randomized(make(), shape), randomized(make(rank=3), shape)
    check_rank(one, three, inputs())
