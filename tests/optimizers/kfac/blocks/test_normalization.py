import keras
import numpy as np
import pytest

from harness.curvature import observed, of_one_example
from kzoo.optimizers.kfac.blocks.base import find_blocks

L = keras.layers
LAYERS = {
    "batch": lambda: L.BatchNormalization(),
    "batch without shift": lambda: L.BatchNormalization(center=False),
    "layer": lambda: L.LayerNormalization(),
    "layer, two axes": lambda: L.LayerNormalization(axis=(-2, -1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_of_one_example_the_diagonal_is_exact(name):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 2)).astype("float32")
    first, tail = LAYERS[name](), [L.Activation("tanh"), L.Flatten(), L.Dense(2)]
    model = keras.Sequential([keras.Input((3, 2)), first, *tail])
    for variable in first.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    part, (d,) = next((p, f) for p, f in observed(model, x) if p.block.layer is first)
    expected = of_one_example(model, x, part)
    found = np.diagonal(expected, axis1=-2, axis2=-1).reshape(d.shape)
    np.testing.assert_allclose(d, found, rtol=1e-3, atol=1e-6)
    # The moving statistics of the copy that was run are not kept.
    for variable in first.non_trainable_variables:
        start = 1.0 if "variance" in variable.path else 0.0
        if "seed" not in variable.path:
            np.testing.assert_array_equal(variable.numpy(), start)


@pytest.mark.parametrize(
    "layer",
    [L.BatchNormalization(axis=1), L.LayerNormalization(scale=False)],
)
def test_other_layers_have_no_block(layer):
    layer.build((None, 3, 2))
    assert find_blocks(layer) == []
