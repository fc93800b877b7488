"""Shapes of Einstein summations against those of Keras's own layer."""

import keras
import numpy as np
import pytest

from kzoo.layers.ops.einsum import einsum_shapes


@pytest.mark.parametrize(
    "equation, input_shape, output_shape",
    [
        ("ab,bc->ac", (None, 5), 3),
        ("abc,cd->abd", (None, 7, 5), (None, 3)),
        ("abc,cd->abd", (2, 7, 5), (7, 3)),
        ("abc,cde->abde", (None, 7, 5), (7, 2, 3)),
        ("abcd,cde->abe", (None, 7, 2, 3), (7, 5)),
        ("...x,xy->...y", (None, 7, 5), 3),
        ("...x,xy->...y", (2, 5), 3),
        ("...xz,xzy->...y", (None, 6, 7, 5, 4), (3,)),
        ("ab...,bc->ac...", (None, 5, 7), 3),
        ("abc,bcd->abd", (None, 7, 5), (7, 3)),
        ("abc, cd -> abd", (None, 7, 5), (7, 3)),
    ],
)
def test_shapes_are_those_of_keras(equation, input_shape, output_shape):
    plain = keras.layers.EinsumDense(equation.replace(" ", ""), output_shape)
    whole = (2, *input_shape[1:])
    output = plain(np.ones(whole))
    _, kernel, found = einsum_shapes(equation, whole, output_shape)
    assert (kernel, found) == (tuple(plain.kernel.shape), tuple(output.shape))
    full, kernel, found = einsum_shapes(equation, input_shape, output_shape)
    assert found == (input_shape[0], *output.shape[1:])
    plain.set_weights([np.random.default_rng(0).normal(size=kernel)])
    x = np.random.default_rng(1).normal(size=whole).astype("float32")
    np.testing.assert_allclose(
        keras.ops.einsum(full, x, plain.kernel), plain(x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "equation, input_shape, output_shape",
    [
        ("ab,bc->ca", (None, 5), 3),  # The batch comes first.
        ("ab,bc", (2, 5), 3),
        ("ab->ac", (2, 5), 3),
        ("a1,1c->ac", (2, 5), 3),
        ("ab,bc->ac", (2, 5, 6), 3),
        ("ab,bc->ac", (2, 5), (3, 4)),
        ("ab,bc->ac", (2, None), 3),
        ("aa,ac->ac", (2, 2), 3),
        ("...x,xy->ay", (2, 7, 5), 3),
        ("abc,cd->abd", (2, 7, 5), (6, 3)),
    ],
)
def test_refuses(equation, input_shape, output_shape):
    with pytest.raises(ValueError, match="Received: equation="):
        einsum_shapes(equation, input_shape, output_shape)
