import keras
import numpy as np
import pytest
from keras import ops

from harness.curvature import check_same_step
from harness.training import QUICK
from kzoo.optimizers import KFAC
from kzoo.optimizers.kfac.blocks.base import find_blocks

L = keras.layers
CASES = {
    "1d": (L.Conv1D(4, 3, padding="same"), (7, 2)),
    "1d causal": (L.Conv1D(4, 3, padding="causal", dilation_rate=2), (7, 2)),
    "1d channels first": (L.Conv1D(4, 2, data_format="channels_first"), (3, 6)),
    "2d strides": (L.Conv2D(4, (3, 2), strides=(2, 1), padding="same"), (6, 5, 3)),
    "2d dilation": (L.Conv2D(3, 2, dilation_rate=2, use_bias=False), (5, 6, 2)),
    "2d groups": (L.Conv2D(6, 2, groups=2), (4, 4, 4)),
    "3d": (L.Conv3D(2, (1, 2, 2), padding="same"), (2, 3, 3, 2)),
    "depthwise": (L.DepthwiseConv2D(3, depth_multiplier=2, strides=2), (6, 5, 3)),
    "depthwise 1d": (L.DepthwiseConv1D(2, padding="same", dilation_rate=2), (6, 3)),
}


def case(name):
    layer, shape = CASES[name]
    layer = type(layer).from_config(layer.get_config())
    layer.build((None, *shape))
    rng = np.random.default_rng(0)
    layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
    return layer, ops.convert_to_tensor(rng.normal(size=(2, *shape)), "float32")


# TensorFlow has no convolution with channels first on a CPU.
@pytest.mark.parametrize(
    "name",
    [pytest.param(c, marks=pytest.mark.jax if "first" in c else ()) for c in CASES],
)
def test_the_layer_multiplies_its_patches_by_its_matrix(name):
    layer, x = case(name)
    (block,) = find_blocks(layer)
    w = block.join([ops.convert_to_tensor(v) for v in block.variables])
    found = ops.einsum("...nri,...ij->...nrj", block.full_rows(x)[None], w[None])[0]
    expected = block.derivatives(layer(x))  # Which lays out outputs like s.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for one, variable in zip(block.split(w), block.variables, strict=True):
        np.testing.assert_array_equal(one, variable.numpy())


def factors_of(layer, x, tail=()):
    model = keras.Sequential([keras.Input(x.shape[1:]), layer, *tail])
    optimizer = KFAC(model, fisher="exact", seed=0)
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    optimizer.observe(ops.convert_to_tensor(x))
    found = next(iter(optimizer.factors.values()))
    return {name: v.numpy() for name, v in found.items()}


def test_with_one_position_it_is_a_dense_layer():
    # A 1 x 1 kernel on a 1 x 1 image, and a kernel of the image's size.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 2, 3, 2)).astype("float32")
    conv, dense = L.Conv2D(3, (2, 3)), L.Dense(3)
    conv.build(x.shape)
    dense.build((None, 12))
    weights = [rng.normal(size=w.shape) for w in dense.get_weights()]
    dense.set_weights(weights)
    conv.set_weights([weights[0].reshape(2, 3, 2, 3), weights[1]])
    found = []
    for layer, given, tail in ((conv, x, [L.Flatten()]), (dense, x.reshape(4, 12), [])):
        last = L.Dense(2, kernel_initializer=keras.initializers.GlorotNormal(seed=1))
        found.append(factors_of(layer, given, [L.Activation("tanh"), *tail, last]))
    one, other = found
    for name in ("A", "G"):
        np.testing.assert_allclose(one[name][0], other[name], rtol=1e-4, atol=1e-6)


def test_the_factors_of_many_positions():
    # s is the output, of T positions and m channels; the loss is |y - s|² / m averaged
    # over examples and positions: each position's curvature is 2/m a aᵀ ⊗ I, and so
    # is their mean's.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 6, 2)).astype("float32")
    found = factors_of(L.Conv1D(4, 3), x)
    patches = np.stack([x[:, t : t + 3].reshape(3, 6) for t in range(4)], 1)
    rows = np.concatenate([patches, np.ones((3, 4, 1))], -1).reshape(12, 7)
    np.testing.assert_allclose(found["A"][0], rows.T @ rows / 12, rtol=1e-5)
    np.testing.assert_allclose(found["G"][0], np.eye(4) / 2, atol=1e-5)


def test_before_a_sum_over_positions_the_curvature_is_that_of_all():
    # With the sum over T positions before the loss, g is the same at each of them: T
    # times as much as with one.
    x = np.random.default_rng(0).normal(size=(3, 6, 2)).astype("float32")
    tail = [L.Lambda(lambda s: ops.sum(s, axis=1))]
    found = factors_of(L.Conv1D(4, 3), x, tail)
    np.testing.assert_allclose(found["G"][0], 4 * np.eye(4) / 2, atol=1e-5)


@pytest.mark.tensorflow  # Without damping float32 is not enough.
def test_undamped_steps_do_not_depend_on_the_coordinates_of_channels():
    # Of the inputs, at each place, and of what goes through a fixed map to another
    # convolution.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 5, 5, 2)), rng.normal(size=(20, 2, 2, 2))
    b, c, m = rng.normal(size=(2, 2)), rng.normal(size=2), rng.normal(size=(3, 3))
    fixed = L.Dense(3, trainable=False, dtype="float64")
    model = keras.Sequential(
        [
            keras.Input((5, 5, 2), dtype="float64"),
            L.Conv2D(3, 2, activation="tanh", dtype="float64"),
            fixed,
            L.Conv2D(2, 2, strides=2, dtype="float64"),
        ]
    )
    weights = [rng.normal(size=w.shape) for w in model.get_weights()]
    outputs = []
    for changed in (False, True):
        kernel, bias, of_fixed, d, *of_last = weights
        given, of_fixed, d = x, np.eye(3), 0 * d
        if changed:
            given, kernel = x @ b + c, np.linalg.solve(b, kernel)
            bias = bias - np.einsum("i,xyio->o", c, kernel)
            of_fixed, d = m, c[0] * m[0]
            of_last[0] = np.linalg.solve(m, of_last[0])
            of_last[1] = of_last[1] - np.einsum("i,xyio->o", d, of_last[0])
        model.set_weights([kernel, bias, of_fixed, d, *of_last])
        start = ops.convert_to_numpy(model(given))
        arguments = {"damping": 1e-13, "momentum": 0.0, "seed": 0}
        model.compile(KFAC(model, 0.1, **arguments), "mse", **QUICK)
        model.train_on_batch(given, y)
        outputs.append((start, ops.convert_to_numpy(model(given))))
    check_same_step(*outputs)
