"""The last layer of regressors: its equation and what it refuses."""

import keras
import numpy as np
import pytest

from harness import check_layer
from kzoo.layers import MeanAndVariance

X = np.random.default_rng(0).normal(size=(5, 3, 4)).astype("float32")


def test_equals_the_equation():
    loc, scale = np.array([3.0, -1.0]), np.array([2.0, 0.5])
    y = keras.ops.convert_to_numpy(MeanAndVariance(loc, scale, floor=0.25)(X))
    a, b = X[..., :2].astype("float64"), X[..., 2:].astype("float64")
    assert y.shape == (5, 3, 2, 2)
    np.testing.assert_allclose(y[..., 0], loc + scale * a, rtol=1e-5, atol=1e-6)
    variance = scale**2 * (np.log1p(np.exp(b)) + 0.25)
    np.testing.assert_allclose(y[..., 1], variance, rtol=1e-5)


def test_the_variance_stays_above_the_floor():
    y = MeanAndVariance(floor=1e-3)(np.array([[0.0, -1e4]], "float32"))
    assert float(y[0, 0, 1]) == pytest.approx(1e-3)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_float32_under_mixed_precision(policy):
    layer = MeanAndVariance(loc=1000.0, dtype=policy)
    y = layer(np.array([[0.125, 0.0]], "float16"))
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
    assert float(y[0, 0, 0]) == 1000.125


@pytest.mark.parametrize(
    "arguments", [{"scale": 0.0}, {"scale": [1.0, -1.0]}, {"floor": 0.0}]
)
def test_no_unit_and_no_floor_are_refused(arguments):
    with pytest.raises(ValueError, match="above 0. Received: scale="):
        MeanAndVariance(**arguments)


@pytest.mark.parametrize(
    ("arguments", "inputs"), [({}, 3), ({"loc": [0.0, 1.0]}, 6), ({"scale": [1.0]}, 4)]
)
def test_other_numbers_of_inputs_are_refused(arguments, inputs):
    with pytest.raises(ValueError, match="2T.*Received: inputs of shape"):
        MeanAndVariance(**arguments)(np.zeros((1, inputs), "float32"))


@pytest.mark.slow
def test_contract():
    arguments = {"loc": [3.0, -1.0], "scale": [2.0, 0.5], "floor": 1e-3}
    check_layer(MeanAndVariance, arguments, (6, 4))
