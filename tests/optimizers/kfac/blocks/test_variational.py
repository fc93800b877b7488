import keras
import numpy as np
import pytest

from harness.curvature import observed, of_one_example
from kzoo.layers import (
    Conv1DFlipout,
    DenseBatchEnsemble,
    DenseFlipout,
    DenseLocalReparameterization,
    DepthwiseConv2DReparameterization,
    EinsumDenseFlipout,
)

EXAMPLES = {"num_examples": 100, "seed": 0}
LAYERS = {
    "dense": (DenseFlipout(3, **EXAMPLES), (4,)),
    "local": (DenseLocalReparameterization(3, **EXAMPLES), (4,)),
    "conv": (Conv1DFlipout(3, 2, **EXAMPLES), (2, 3)),
    "depthwise": (
        DepthwiseConv2DReparameterization((2, 1), depth_multiplier=2, **EXAMPLES),
        (2, 1, 3),
    ),
    "einsum": (
        EinsumDenseFlipout("ab,bcd->acd", (2, 2), bias_axes="cd", **EXAMPLES),
        (4,),
    ),
    # Of an ensemble the layer that its members share has the block of a plain one.
    "ensemble": (DenseBatchEnsemble(3, ensemble_size=1), (4,)),
}


@pytest.mark.filterwarnings("ignore:KFAC knows no")
@pytest.mark.parametrize("name", LAYERS)
def test_of_one_example_the_factors_are_exact(name):
    layer, shape = LAYERS[name]
    layer = type(layer).from_config(layer.get_config())
    tail = [keras.layers.Activation("tanh"), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input(shape), layer, *tail, keras.layers.Dense(2)])
    rng = np.random.default_rng(0)
    for variable in layer.trainable_variables:
        if "scale" in variable.name:  # The copies of an example draw different weights.
            variable.assign(variable - 10)
    x = rng.normal(size=(1, *shape)).astype("float32")
    part, (a, g) = observed(model, x)[0]
    assert part.variables[0].shape[-1] > 1 and len(part.variables) == 1 + (
        name != "ensemble"
    )
    expected = of_one_example(model, x, part)
    found = np.einsum("...ij,...kl->...ikjl", a, g).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
