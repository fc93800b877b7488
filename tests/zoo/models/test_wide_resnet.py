"""The wide residual network: its definition, its size, its penalty, as an ensemble."""

from functools import partial

import keras
import numpy as np
import pytest

from harness import check_model
from harness.by_hand import batch_norm, conv2d, randomize, relu, softmax, value
from kzoo.layers import (
    BatchNormalizationBatchEnsemble,
    Conv2DFlipout,
    DenseFlipout,
    PosteriorMean,
    to_bayesian,
)
from kzoo.zoo import build
from kzoo.zoo.models.batch_ensemble import batch_ensemble
from kzoo.zoo.models.wide_resnet import wide_resnet
from kzoo.zoo.predictive import classification

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype("float32")
SMALL = {"input_shape": (8, 8, 3), "depth": 10, "width": 1}
NAMES = ("wide_resnet28_10_cifar10", "wide_resnet28_10_batch_ensemble_cifar10")


def written_out(model, images, blocks):
    """The logits that the paper's formula gives."""

    def convolution(x, name, strides=1):
        return conv2d(x, value(model.get_layer(f"{name}_conv").kernel), strides)

    def bn_relu(x, name):
        return relu(batch_norm(x, model.get_layer(f"{name}_bn"), 1e-5))

    x = convolution(images, "stem")
    for stage, strides in enumerate((1, 2, 2)):
        for i in range(blocks):
            name = f"stage{stage}_block{i}"
            strides = strides if i == 0 else 1
            y = convolution(bn_relu(x, f"{name}_1"), f"{name}_1", strides)
            y = convolution(bn_relu(y, f"{name}_2"), f"{name}_2")
            x = y + (convolution(x, f"{name}_shortcut", strides) if i == 0 else x)
    kernel, bias = map(value, model.get_layer("logits").weights)
    return bn_relu(x, "last").mean((1, 2)) @ kernel + bias


def test_equals_the_paper_written_out():
    scale, offset = [0.01, 0.02, 0.005], [-1.0, 0.5, 0.0]
    model = wide_resnet(
        (8, 8, 3), classes=5, depth=16, width=2, scale=scale, offset=offset
    )
    randomize(model)
    expected = written_out(model, IMAGES * scale + offset, blocks=2)
    np.testing.assert_allclose(model.predict(IMAGES, verbose=0), expected, rtol=1e-4)


@pytest.mark.tensorflow  # Thirty-six million numbers are the same on JAX.
def test_size_of_the_paper():
    def convolution(*args, **kwargs):
        return keras.layers.Conv2D(*args, **{**kwargs, "kernel_initializer": "zeros"})

    model = build("wide_resnet28_10_cifar10", conv=convolution)
    assert model.input_shape == (None, 32, 32, 3)
    kernels, channels, inputs = 9 * 3 * 16, 0, 16
    for outputs in (160, 320, 640):
        kernels += inputs * outputs  # the shortcut
        for _ in range(4):
            kernels += 9 * inputs * outputs + 9 * outputs**2
            channels += inputs + outputs
            inputs = outputs
    channels += 640
    # γ and β, the mean and the variance of each channel, and the last layer.
    trainable = kernels + 2 * channels + 641 * 10
    assert trainable == 36_479_194
    assert model.count_params() == trainable + 2 * channels == 36_497_146


def test_normalizations_are_torchs():
    layers = [
        x
        for x in wide_resnet(classes=3, **SMALL).layers
        if isinstance(x, keras.layers.BatchNormalization)
    ]
    assert len(layers) == 2 * 3 + 1
    assert {(x.momentum, x.epsilon) for x in layers} == {(0.9, 1e-5)}


def test_normalizations_may_be_each_members_own():
    own = partial(BatchNormalizationBatchEnsemble, 2)
    method = batch_ensemble(2, fast_weights=-0.5)
    model = wide_resnet(classes=3, normalization=own, l2=1e-4, **method, **SMALL)
    found = [type(x) for x in model.layers if x.name.endswith("_bn")]
    assert found == [BatchNormalizationBatchEnsemble] * 7


@pytest.mark.parametrize("name", NAMES)
def test_penalty_on_all_weights_but_fast_ones(name):
    model = build(name, l2=1e-2, **SMALL)
    randomize(model)
    decayed = [
        v
        for layer in model.layers
        for v in layer.trainable_variables
        if isinstance(layer, keras.layers.BatchNormalization)
        or v.path.endswith(("/kernel", "/bias"))
    ]
    # 9 convolutions, the dense layer's kernel and bias, 7 normalizations.
    assert len(decayed) == 9 + 2 + 2 * 7
    expected = 1e-2 * sum((value(v) ** 2).sum() for v in decayed)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)
    assert build(name, l2=0.0, **SMALL).losses == []


@pytest.mark.parametrize(("name", "l2"), zip(NAMES, (2e-4, 3e-4), strict=True))
def test_penalties_of_uncertainty_baselines(name, l2):
    layer = build(name, **SMALL).get_layer("stem_conv")
    penalty = getattr(layer, "shared", layer).kernel_regularizer
    assert float(penalty.l2) == pytest.approx(l2)


def test_members_are_networks_with_their_own_kernels():
    # Member m is the single network with the kernels W * (r_m s_m^T).
    single, ensemble = (build(name, **SMALL) for name in NAMES)
    randomize(ensemble)
    fast, probs = 0, []
    for m in range(4):
        for layer in single.layers:
            if not layer.weights:
                continue
            twin = ensemble.get_layer(layer.name)
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.set_weights(twin.get_weights())
                continue
            alpha, gamma = value(twin.alpha)[m], value(twin.gamma)[m]
            fast += len(alpha) + len(gamma)
            weights = [value(twin.kernel) * alpha[:, None] * gamma]
            if twin.use_bias:
                weights.append(value(twin.bias)[m])
            layer.set_weights(weights)
        probs.append(softmax(single.predict(IMAGES, verbose=0)))
    found = value(classification(ensemble)[1](IMAGES)["member_probabilities"])
    np.testing.assert_allclose(found, np.stack(probs, 1), rtol=1e-3, atol=1e-5)
    assert np.abs(found[:, 0] - found[:, 1]).max() > 1e-2
    biases = (4 - 1) * 10
    assert ensemble.count_params() == single.count_params() + fast + biases


@pytest.mark.tensorflow  # Ten random layers take JAX minutes to compile.
def test_flipout_version_is_the_plain_one_at_the_mean_of_its_weights():
    plain = wide_resnet(classes=3, **SMALL)
    flipout = to_bayesian(plain, num_examples=10)
    mean = PosteriorMean(flipout).predict(IMAGES, verbose=0)
    np.testing.assert_allclose(mean, plain.predict(IMAGES, verbose=0), atol=1e-4)
    kinds = [type(x) for x in flipout.layers]
    assert (kinds.count(Conv2DFlipout), kinds.count(DenseFlipout)) == (9, 1)


@pytest.mark.parametrize("depth", [4, 12, 8, -2, 16.0])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match="Received: depth="):
        wide_resnet((8, 8, 3), classes=3, depth=depth, width=1)


@pytest.mark.parametrize("name", ["width", "ensemble_size"])
def test_no_number_of_members_or_channels_is_refused(name):
    with pytest.raises(ValueError, match=f"Received: {name}=0"):
        wide_resnet(classes=3, **{**SMALL, name: 0})


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    check_model(name, depth=10, width=1)
