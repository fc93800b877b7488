import keras
import numpy as np
import pytest
from keras import ops

from kzoo.optimizers.kfac.blocks.base import find_blocks

# Equation, output shape, bias axes, input shape, the shape of the matrices, whether
# the bias is part of them.
CASES = [
    ("ab,bc->ac", (3,), "c", (2, 4), (5, 3), True),
    ("abc,cde->abde", (None, 2, 3), "de", (2, 5, 4), (5, 6), True),
    ("abcd,cde->abe", (None, 6), "e", (2, 5, 2, 3), (7, 6), True),
    ("...x,xy->...y", (3,), "y", (2, 5, 4), (5, 3), True),
    ("abc,cd->ad", (3,), None, (2, 5, 4), (4, 3), False),
    ("abc,bcd->abd", (5, 3), None, (2, 5, 4), (5, 4, 3), False),
    ("abc,dc->adb", (3, None), "d", (2, 5, 4), (5, 3), True),
    ("ab,bcd->acd", (2, 3), "d", (2, 4), (4, 6), False),
]


@pytest.mark.parametrize("equation, out, axes, shape, of_matrix, joined", CASES)
def test_the_layer_multiplies_its_rows_by_its_matrices(
    equation, out, axes, shape, of_matrix, joined
):
    layer = keras.layers.EinsumDense(equation, out, bias_axes=axes)
    layer.build(shape)
    rng = np.random.default_rng(0)
    layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
    x = ops.convert_to_tensor(rng.normal(size=shape), "float32")
    (block,) = find_blocks(layer)
    assert block.full_shape == of_matrix
    assert (block.bias is not None) == joined
    w = block.join([ops.convert_to_tensor(v) for v in block.variables])
    found = ops.matmul(block.full_rows(x), w[..., None, :, :])
    outputs = layer(x)
    if axes and not joined:
        outputs = outputs - layer.bias
    np.testing.assert_allclose(found, block.derivatives(outputs), rtol=1e-4, atol=1e-5)
    for one, variable in zip(block.split(w), block.variables, strict=True):
        np.testing.assert_array_equal(one, variable.numpy())
