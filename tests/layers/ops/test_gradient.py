import numpy as np
from keras import ops

from kzoo.layers.ops.gradient import gradients


def test_gradients():
    x, y, z = (ops.convert_to_tensor(v, "float32") for v in ([1.0, 2.0], 3.0, [4.0]))
    found = gradients(lambda x, y, z: ops.sum(x * x) * y, [x, y, z])
    for one, expected in zip(found, ([6.0, 12.0], 5.0, [0.0]), strict=True):
        np.testing.assert_allclose(one, expected)
    assert gradients(lambda: 1.0, []) == []


def test_the_gradient_of_a_table_is_dense():
    table = ops.ones((4, 2))
    (found,) = gradients(lambda t: ops.sum(ops.take(t, [1, 1, 3], axis=0)), [table])
    np.testing.assert_allclose(found, [[0, 0], [2, 2], [0, 0], [1, 1]])
