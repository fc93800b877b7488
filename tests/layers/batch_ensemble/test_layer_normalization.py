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
    each_on_its_own,
    normal,
    randomized,
    values,
)
from kzoo.layers import LayerNormalizationBatchEnsemble

SHAPE = (2 * M, 3, 4)


@pytest.mark.slow
def test_contract():
    check_layer(
        LayerNormalizationBatchEnsemble,
        {
            "ensemble_size": 3,
            "epsilon": 1e-2,
            "gamma_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=1),
            "beta_initializer": keras.initializers.RandomNormal(seed=2),
            "gamma_regularizer": "l2",
        },
        (6, 2, 3),
    )


@pytest.mark.parametrize(
    "arguments",
    ({}, {"axis": [1, 2], "epsilon": 0.1}, {"axis": 1, "center": False}),
    ids=str,
)
def test_equals_a_plain_layer_for_each_member(arguments):
    plain = keras.layers.LayerNormalization(dtype=DTYPE, **arguments)
    plain.build(SHAPE)
    layer = LayerNormalizationBatchEnsemble(M, dtype=DTYPE, **arguments)
    layer = randomized(layer, SHAPE)
    assert layer.count_params() == M * plain.count_params()
    check_equal(layer, each_on_its_own(layer, plain), normal(*SHAPE))
    check_isolated(layer, normal(*SHAPE), normal(*SHAPE, seed=1))


@pytest.mark.parametrize("arguments", ({"scale": False}, {"scale": False, "center": 0}))
def test_starts_as_the_plain_layer(arguments):
    x = normal(*SHAPE)
    plain = keras.layers.LayerNormalization(dtype=DTYPE, **arguments)
    layer = LayerNormalizationBatchEnsemble(M, dtype=DTYPE, **arguments)
    np.testing.assert_allclose(values(layer(x)), values(plain(x)), TOL, TOL)


def test_computes_in_single_precision():
    """Squares of these overflow in half precision, and the result is rounded once."""
    shape = (M, 50, 4)
    x = (300 * normal(*shape)).astype("float16")
    layer = LayerNormalizationBatchEnsemble(M, dtype="mixed_float16")
    layer = randomized(layer, shape)
    plain = keras.layers.LayerNormalization(dtype="mixed_float16")
    plain.build(shape)
    output = layer(x)
    assert keras.backend.standardize_dtype(output.dtype) == "float16"
    for m in range(M):
        plain.set_weights([values(weight)[m] for weight in layer.weights])
        apart = values(output[m]) != values(plain(x[m : m + 1])[0])
        assert apart.mean() < 0.02


def test_refuses():
    with pytest.raises(ValueError, match="Received: rms_scaling=True"):
        LayerNormalizationBatchEnsemble(rms_scaling=True)
    with pytest.raises(ValueError, match="ensemble_size=4. Received: a batch of 6"):
        LayerNormalizationBatchEnsemble()(np.zeros((6, 3)))
