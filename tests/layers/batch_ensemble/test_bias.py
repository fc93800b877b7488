import keras
import numpy as np
import pytest

from harness import check_layer
from harness.members import DTYPE, M, check_isolated, normal, randomized, values
from kzoo.layers import BiasBatchEnsemble

SHAPE = (2 * M, 3, 4, 5)


@pytest.mark.slow
def test_contract():
    check_layer(
        BiasBatchEnsemble,
        {
            "ensemble_size": 3,
            "axis": (1, -1),
            "bias_initializer": keras.initializers.RandomNormal(seed=1),
            "bias_regularizer": "l2",
            "bias_constraint": "non_neg",
        },
        (6, 2, 3, 2),
    )


@pytest.mark.parametrize(
    "axis, size",
    [
        (-1, (5,)),
        (1, (3,)),
        ((-1, 1), (3, 5)),  # In the input's order.
        ((1, 2, 3), (3, 4, 5)),
        ((), ()),
    ],
)
def test_adds_each_members_own(axis, size):
    layer = BiasBatchEnsemble(M, axis, dtype=DTYPE)
    x = normal(*SHAPE)
    np.testing.assert_array_equal(values(layer(x)), x)  # It starts as zeros.
    layer = randomized(layer, SHAPE)
    assert tuple(layer.bias.shape) == (M, *size)
    axes = [axis] if isinstance(axis, int) else axis
    broadcast = [SHAPE[i] if i in axes or i - 4 in axes else 1 for i in (1, 2, 3)]
    bias = np.repeat(values(layer.bias).reshape(M, *broadcast), 2, axis=0)
    np.testing.assert_array_equal(values(layer(x)), x + bias)
    check_isolated(layer, x, normal(*SHAPE, seed=1))


@pytest.mark.parametrize("axis", (None, "1", 1.5, (1, None), True))
def test_refuses_axes(axis):
    with pytest.raises(ValueError, match="Received: axis="):
        BiasBatchEnsemble(axis=axis)


@pytest.mark.parametrize("axis", (0, 4, -4, (1, -3), 2))
def test_refuses_axes_of_the_input(axis):
    layer = BiasBatchEnsemble(axis=axis)
    with pytest.raises(ValueError, match="Received: axis="):
        layer.build((8, 3, None, 5))


def test_refuses_rows_that_do_not_split():
    with pytest.raises(ValueError, match="ensemble_size=4. Received: a batch of 6"):
        BiasBatchEnsemble()(np.zeros((6, 3)))
    with pytest.raises(ValueError, match="ensemble_size=4. Received: a batch of 6"):
        BiasBatchEnsemble().compute_output_shape((6, 3))
    with pytest.raises(ValueError, match="Received: ensemble_size=0"):
        BiasBatchEnsemble(0)
