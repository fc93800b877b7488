import keras
import numpy as np
import pytest
from keras import ops

from kzoo.optimizers import KFAC, CurvatureBlock, register_curvature_block
from kzoo.optimizers.kfac.blocks.base import find_blocks


class Doubled(keras.layers.Dense):
    def call(self, inputs, training=None):
        return super().call(2 * inputs)


class Named(keras.layers.Dense):
    pass


def built(layer):
    layer.build((None, 3))
    return layer


def test_a_registered_block_is_used():
    assert find_blocks(built(Doubled(2))) == []

    @register_curvature_block(Doubled)
    class DoubledBlock(CurvatureBlock):
        def rows(self, inputs):
            return super().rows(2 * inputs)

    model = keras.Sequential([keras.Input((3,)), Doubled(2)])
    optimizer = KFAC(model)
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    optimizer.observe(ops.convert_to_tensor(x))
    (found,) = optimizer.factors.values()
    a = np.concatenate([2 * x, np.ones((4, 1))], 1)
    np.testing.assert_allclose(found["A"].numpy(), a.T @ a / 4, rtol=1e-5)


def test_a_subclass_with_the_same_call_has_its_base_classes_block():
    (found,), (base,) = (
        find_blocks(built(cls(2))) for cls in (Named, keras.layers.Dense)
    )
    assert type(found) is type(base) is not None


def test_w_has_the_bias_in_its_last_row():
    (block,) = find_blocks(built(keras.layers.Dense(2)))
    kernel, bias = np.arange(6.0).reshape(3, 2), np.array([6.0, 7.0])
    w = block.join([kernel, bias])
    np.testing.assert_array_equal(w, np.arange(8.0).reshape(4, 2))
    for found, expected in zip(block.split(w), (kernel, bias), strict=True):
        np.testing.assert_array_equal(found, expected)
    (without,) = find_blocks(built(keras.layers.Dense(2, use_bias=False)))
    assert without.full_shape == (3, 2) and len(without.variables) == 1


@pytest.mark.parametrize("thing", [int, "Dense"])
def test_only_layers_have_blocks(thing):
    with pytest.raises(ValueError, match="Received: layer_class="):
        register_curvature_block(thing)
