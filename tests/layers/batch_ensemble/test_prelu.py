import keras
import numpy as np
import pytest

from harness import check_layer
from harness.members import (
    DTYPE,
    M,
    check_equal,
    check_isolated,
    each_on_its_own,
    normal,
    randomized,
    values,
)
from kzoo.layers import PReLUBatchEnsemble

SHAPE = (2 * M, 3, 4, 5)


@pytest.mark.slow
def test_contract():
    check_layer(
        PReLUBatchEnsemble,
        {
            "ensemble_size": 3,
            "alpha_initializer": keras.initializers.RandomNormal(0.2, 0.1, seed=1),
            "alpha_regularizer": "l2",
            "alpha_constraint": "non_neg",
            "shared_axes": [1],
        },
        (6, 2, 3),
    )


@pytest.mark.parametrize("axes", (None, [1, 2], [2], [1, 2, 3]))
def test_equals_a_plain_layer_for_each_member(axes):
    plain = keras.layers.PReLU(shared_axes=axes, dtype=DTYPE)
    plain.build(SHAPE)
    layer = PReLUBatchEnsemble(M, shared_axes=axes, dtype=DTYPE)
    layer = randomized(layer, SHAPE)
    assert tuple(layer.alpha.shape) == (M, *plain.alpha.shape)
    check_equal(layer, each_on_its_own(layer, plain), normal(*SHAPE))
    check_isolated(layer, normal(*SHAPE), normal(*SHAPE, seed=1))


def test_starts_as_a_rectifier():
    x = normal(*SHAPE)
    layer = PReLUBatchEnsemble(M, dtype=DTYPE)
    np.testing.assert_array_equal(values(layer(x)), np.maximum(x, 0))


def test_refuses_rows_that_do_not_split():
    with pytest.raises(ValueError, match="ensemble_size=4. Received: a batch of 6"):
        PReLUBatchEnsemble()(np.zeros((6, 3)))
