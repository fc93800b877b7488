import keras
import numpy as np
import pytest

from kzoo.layers.ops.arguments import (
    finite,
    integer,
    is_integer,
    nonnegative,
    positive,
    rate,
    share,
)


@pytest.mark.parametrize("value", (1, 7, np.int64(7), np.uint8(7)))
def test_integers(value):
    assert is_integer(value)
    result = integer("n", value)
    assert result == value and type(result) is int


@pytest.mark.parametrize(
    "value", (True, np.True_, 1.0, np.float32(2), "2", None, [1], np.ones(1, int))
)
def test_what_is_none(value):
    assert not is_integer(value)
    with pytest.raises(ValueError, match="expected `n` to be an integer.*Received: n="):
        integer("n", value)


def test_the_least():
    assert integer("n", 0, least=0) == 0 and integer("n", -3, least=-3) == -3
    for value, least in ((0, 1), (-1, 0), (np.int64(1), 2)):
        with pytest.raises(ValueError, match=f"at least {least}. Received: n="):
            integer("n", value, least)


def test_rates():
    for value in (0, 0.5, np.float32(0.25)):
        assert rate("p", value) == value and type(rate("p", value)) is float
    for value in (1, -0.1, True, "0.5", None, float("nan")):
        with pytest.raises(ValueError, match="expected `p` to be .*Received: p="):
            rate("p", value)


def test_shares():
    for value in (1, 0.5, np.float32(0.25)):
        assert share("p", value) == value and type(share("p", value)) is float
    for value in (0, 1.1, True, "0.5", None, float("nan")):
        with pytest.raises(ValueError, match="expected `p` to be .*Received: p="):
            share("p", value)


def test_numbers_of_at_least_0():
    for value in (0, 0.5, 3, np.float32(0.25)):
        assert nonnegative("a", value) == value
        assert type(nonnegative("a", value)) is float
    for value in (-0.1, True, "0.5", None, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected `a` to be .*Received: a="):
            nonnegative("a", value)


def test_finite_numbers():
    for value in (-2, 0, 0.5, np.float32(0.25)):
        assert finite("s", value) == value and type(finite("s", value)) is float
    for value in (True, "0.5", None, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected `s` to be .*Received: s="):
            finite("s", value)


def test_positive_numbers():
    for value in (2, 0.5, np.float32(0.25)):
        assert positive("s", value) == value and type(positive("s", value)) is float
    for value in (0, -0.1, True, "0.5", None, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected `s` to be .*Received: s="):
            positive("s", value)


def test_keras_saves_what_was_numpys():
    from kzoo.layers import DenseBatchEnsemble

    layer = DenseBatchEnsemble(np.int64(3), np.int64(2), np.int64(2))
    config = keras.saving.serialize_keras_object(layer)["config"]
    assert (config["units"], config["rank"], config["ensemble_size"]) == (3, 2, 2)
