"""LeNet-5, layer by layer, and with distributions over its weights."""

import keras
import numpy as np
import pytest

from harness import check_model
from kzoo.layers import (
    Conv2DFlipout,
    DenseFlipout,
    PosteriorMean,
    from_bayesian,
)
from kzoo.zoo import build
from kzoo.zoo.models.lenet import lenet5

IMAGES = np.random.default_rng(0).integers(0, 17, (3, 8, 8, 1)).astype("float32")


def value(x):
    return keras.ops.convert_to_numpy(x).astype("float64")


def conv2d(x, kernel, bias, padding):
    """An explicit convolution."""
    size = kernel.shape[0]
    if padding == "same":
        x = np.pad(x, [(0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)])
    height, width = (n - size + 1 for n in x.shape[1:3])
    y = np.zeros((len(x), height, width, kernel.shape[-1])) + bias
    for i in range(size):
        for j in range(size):
            patch = x[:, i : i + height, j : j + width]
            y += patch @ kernel[i, j]
    return y


def pool(x):
    b, h, w, c = x.shape
    return (
        x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
    )


@pytest.mark.parametrize(("size", "padding"), [(17, "valid"), (9, "same")])
def test_equals_the_layers_written_out(size, padding):
    model = lenet5((size, size, 2), classes=4, scale=0.5, padding=padding)
    rng = np.random.default_rng(1)
    for v in model.weights:
        v.assign(rng.normal(size=v.shape) * 0.2)
    images = rng.normal(size=(3, size, size, 2)).astype("float32")
    x = images * 0.5
    for name in ("conv0", "conv1"):
        kernel, bias = map(value, model.get_layer(name).weights)
        x = pool(np.maximum(conv2d(x, kernel, bias, padding), 0))
    x = x.reshape(3, -1)
    for name in ("dense0", "dense1", "logits"):
        kernel, bias = map(value, model.get_layer(name).weights)
        x = x @ kernel + bias
        x = x if name == "logits" else np.maximum(x, 0)
    found = model.predict(images, verbose=0)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)


def test_sizes_of_the_paper():
    model = lenet5((32, 32, 1), classes=10, padding="valid")
    kernels = [tuple(v.shape) for v in model.weights if v.path.endswith("kernel")]
    assert kernels == [(5, 5, 1, 6), (5, 5, 6, 16), (400, 120), (120, 84), (84, 10)]


@pytest.mark.parametrize(
    ("shape", "padding", "least"), [((8, 8, 1), "valid", 16), ((8, 3, 1), "same", 4)]
)
def test_images_that_nothing_would_be_left_of_are_refused(shape, padding, least):
    with pytest.raises(ValueError, match=f"at least {least} pixels.*Received: input_"):
        lenet5(shape, classes=10, padding=padding)


def test_other_padding_is_refused():
    with pytest.raises(ValueError, match="'valid', 'same'.*Received: padding='causal'"):
        lenet5((32, 32, 1), classes=10, padding="causal")


def test_flipout_version_is_the_plain_one_at_the_mean_of_its_weights():
    model = build("lenet5_flipout_digits", num_examples=10, stddev=0.1)
    kinds = [type(x) for x in model.layers if x.weights]
    assert kinds == [Conv2DFlipout] * 2 + [DenseFlipout] * 3
    plain = build("lenet5_digits")
    plain.set_weights(from_bayesian(model).get_weights())
    mean = PosteriorMean(model).predict(IMAGES, verbose=0)
    np.testing.assert_allclose(mean, plain.predict(IMAGES, verbose=0), atol=1e-4)


def test_arguments_reach_the_flipout_layers():
    model = build("lenet5_flipout_digits", num_examples=7, stddev=0.2, prior_stddev=3.0)
    for layer in (model.get_layer("conv1"), model.get_layer("logits")):
        assert layer.num_examples == 7
        np.testing.assert_allclose(value(layer.kernel_posterior.stddev()), 0.2, 1e-4)
        np.testing.assert_allclose(value(layer.kernel_prior.stddev()), 3.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lenet5_digits", "lenet5_flipout_digits"])
def test_contract(name):
    check_model(name)
