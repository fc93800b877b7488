"""The residual network: its definition, layer by layer, and as an ensemble."""

from functools import partial

import keras
import numpy as np
import pytest

from harness import check_model, check_same_model
from harness.by_hand import batch_norm, conv2d, randomize, relu, softmax, value
from kzoo.layers import (
    Conv2DBatchEnsemble,
    Conv2DFlipout,
    DenseBatchEnsemble,
    DenseFlipout,
    PosteriorMean,
    from_bayesian,
)
from kzoo.zoo import build
from kzoo.zoo.models.resnet import resnet
from kzoo.zoo.predictive import classification

IMAGES = np.random.default_rng(0).integers(0, 17, (6, 8, 8, 1)).astype("float32")


def test_equals_the_paper_written_out():
    model = resnet((8, 8, 1), classes=10, depth=8, width=4, scale=1 / 16)
    randomize(model)

    def conv_bn(x, name, strides=1):
        kernel = value(model.get_layer(f"{name}_conv").kernel)
        x = conv2d(x, kernel, strides)
        return batch_norm(x, model.get_layer(f"{name}_bn"), 1e-3)

    x = relu(conv_bn(IMAGES / 16, "stem"))
    for stage, strides in enumerate((1, 2, 2)):
        name = f"stage{stage}_block0"
        y = conv_bn(relu(conv_bn(x, f"{name}_1", strides)), f"{name}_2")
        x = relu(y + (conv_bn(x, f"{name}_shortcut", strides) if strides > 1 else x))
    assert x.shape[1:] == (2, 2, 16)
    kernel, bias = map(value, model.get_layer("logits").weights)
    expected = x.mean((1, 2)) @ kernel + bias
    np.testing.assert_allclose(model.predict(IMAGES, verbose=0), expected, rtol=2e-5)


@pytest.mark.parametrize(("depth", "convolutions"), [(8, 7 + 2), (20, 19 + 2)])
def test_depth_counts_layers_with_weights(depth, convolutions):
    # 6n + 1 convolutions and a dense layer; two shortcuts change the shape.
    model = resnet((8, 8, 1), classes=10, depth=depth, width=2)
    layers = [x for x in model.layers if isinstance(x, keras.layers.Conv2D)]
    assert len(layers) == convolutions


@pytest.mark.slow
@pytest.mark.tensorflow  # Sizes are the same on JAX.
def test_sizes_for_cifar10():
    # Of ResNet-n the paper has 0.27 and 0.46 million, without shortcuts with weights.
    def size(depth, w, shortcuts):
        n = (depth - 2) // 6
        kernels = 9 * w * (3 + w * (2 * n + 2 + 4 * (2 * n - 1) + 8 + 16 * (2 * n - 1)))
        channels = w * (1 + 2 * n * 7)
        if shortcuts:
            kernels, channels = kernels + w * w * (2 + 8), channels + w * 6
        return kernels + 2 * channels, 2 * channels, (4 * w + 1) * 10

    assert [round(sum(size(d, 16, False)[::2]) / 1e6, 2) for d in (20, 32)] == [
        0.27,
        0.46,
    ]
    for name, arguments in {
        "resnet20_cifar10": (20, 16),
        "resnet32_cifar10": (32, 16),
    }.items():
        assert build(name).count_params() == sum(size(*arguments, True))
        ensemble = build(name.replace("_", "_batch_ensemble_"), width=1)
        convolutions = [x for x in ensemble.layers if x.name.endswith("_conv")]
        assert len(convolutions) == arguments[0] - 1 + 2
    # Four times as wide, as in the BatchEnsemble paper, where its name is ResNet-32x4.
    wide = build("resnet32_cifar10", width=64)
    assert wide.count_params() == sum(size(32, 64, True))


def test_normalization_is_a_factorys():
    made = []

    def normalization(**kwargs):
        made.append(keras.layers.BatchNormalization(**kwargs))
        return made[-1]

    model = resnet((8, 8, 1), 10, depth=8, width=2, normalization=normalization)
    assert len(made) == 9 and all(layer in model.layers for layer in made)


@pytest.mark.parametrize("name", ["ensemble_size", "width"])
@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"])
def test_no_number_of_members_or_channels_is_refused(name, size):
    with pytest.raises(ValueError, match=f"Received: {name}="):
        resnet((8, 8, 1), classes=10, depth=8, **{name: size})


@pytest.mark.parametrize("depth", [2, 7, 9, 18, -4])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match="6n \\+ 2.*Received: depth="):
        resnet((8, 8, 1), classes=10, depth=depth)


def test_penalty_on_kernels_only():
    model = resnet((8, 8, 1), classes=10, depth=8, width=2, l2=1e-2)
    randomize(model)
    kernels = [v for v in model.weights if v.path.endswith("kernel")]
    assert len(kernels) == 10
    expected = 1e-2 * sum((value(v) ** 2).sum() for v in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)
    assert resnet((8, 8, 1), classes=10, depth=8, width=2).losses == []


def test_penalty_on_an_ensembles_shared_kernels_only():
    model = build("resnet8_batch_ensemble_digits", width=2, l2=1e-2)
    randomize(model)
    kernels = [v for v in model.weights if v.path.endswith("kernel")]
    assert len(kernels) == 10
    expected = 1e-2 * sum((value(v) ** 2).sum() for v in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


def test_ensemble_is_the_single_networks_average():
    # Member m is the single network with the kernels W * (r_m s_m^T).
    ensemble = build("resnet8_batch_ensemble_digits", width=2)
    randomize(ensemble)
    single = build("resnet8_digits", width=2)
    probs = []
    for m in range(4):
        for layer in single.layers:
            if not layer.weights:
                continue
            twin = ensemble.get_layer(layer.name)
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.set_weights(twin.get_weights())
                continue
            alpha, gamma = value(twin.alpha)[m], value(twin.gamma)[m]
            weights = [value(twin.kernel) * alpha[:, None] * gamma]
            if twin.use_bias:
                weights.append(value(twin.bias)[m])
            layer.set_weights(weights)
        probs.append(softmax(single.predict(IMAGES, verbose=0)))
    _, predict = classification(ensemble)
    members = value(predict(IMAGES)["member_probabilities"])
    np.testing.assert_allclose(members, np.stack(probs, 1), rtol=1e-3, atol=1e-6)
    assert np.abs(members[:, 0] - members[:, 1]).max() > 1e-2
    np.testing.assert_allclose(
        softmax(ensemble.predict(IMAGES, verbose=0)),
        np.mean(probs, 0),
        rtol=1e-3,
        atol=1e-6,
    )


def test_members_start_apart_and_each_time_anew():
    alphas = []
    for _ in range(2):
        model = build("resnet8_batch_ensemble_digits", width=2)
        alphas.append(value(model.get_layer("logits").alpha))
    assert np.abs(alphas[0] - alphas[1]).max() > 0.1
    assert np.ptp(alphas[0], axis=0).min() > 0
    signs = build("resnet8_batch_ensemble_digits", width=8, fast_weights=0.5)
    layer = signs.get_layer("logits")
    assert set(np.unique(value(layer.alpha))) == {-1.0, 1.0}
    assert not np.array_equal(value(layer.alpha)[:, :10], value(layer.gamma))


def test_parameters_of_members():
    single, ensemble = (
        build(f"resnet8{kind}_digits", width=4) for kind in ("", "_batch_ensemble")
    )
    kernels = [v.shape for v in single.weights if v.path.endswith("kernel")]
    fast = sum(4 * (k[-2] + k[-1]) for k in kernels) + (4 - 1) * 10  # and biases
    assert ensemble.count_params() == single.count_params() + fast


def test_factories_are_the_models_only_difference():
    method = {"ensemble_size": 2}
    model = resnet(
        (8, 8, 1),
        classes=10,
        depth=8,
        width=2,
        conv=partial(Conv2DBatchEnsemble, **method),
        dense=partial(DenseBatchEnsemble, **method),
        ensemble_size=2,
    )
    # Fast weights of ones: all members are the network itself.
    plain = resnet((8, 8, 1), classes=10, depth=8, width=2)
    for layer in plain.layers:
        twin = model.get_layer(layer.name)
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights(twin.get_weights())
        elif layer.weights:
            layer.kernel.assign(value(twin.kernel))
    np.testing.assert_allclose(
        softmax(plain.predict(IMAGES, verbose=0)),
        softmax(model.predict(IMAGES, verbose=0)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_training_rows_belong_to_members():
    model = build("resnet8_batch_ensemble_digits", width=2)
    assert model(IMAGES).shape[0] == 6
    assert model(IMAGES[:4], training=True).shape[0] == 4  # one row a member


def test_logits_stay_float32_in_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        for name in ("resnet8_digits", "resnet8_batch_ensemble_digits"):
            model = build(name, width=2)
            assert keras.backend.standardize_dtype(model(IMAGES).dtype) == "float32"
            assert model.get_layer("stem_conv").compute_dtype == "bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")


# Ten random layers take JAX minutes to compile; LeNet-5's and the perceptron's Flipout
# versions are checked on both backends.
@pytest.mark.tensorflow
def test_flipout_version_is_the_plain_one_at_the_mean_of_its_weights():
    model = build(
        "resnet8_flipout_digits", width=2, num_examples=7, stddev=0.2, prior_stddev=3.0
    )
    layers = [x for x in model.layers if isinstance(x, (Conv2DFlipout, DenseFlipout))]
    assert len(layers) == 10 and model.name == "resnet8_flipout_digits"
    expected = 0.0  # The divergence in closed form, and no penalty beside it.
    for layer in layers:
        assert layer.num_examples == 7
        mean = value(layer.kernel_posterior.mean()).astype("float64")
        terms = (0.2**2 + mean**2) / 3.0**2 - 1 - 2 * np.log(0.2 / 3.0)
        expected += 0.5 * terms.sum() / 7
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-4)
    plain = build("resnet8_digits", width=2)
    plain.set_weights(from_bayesian(model).get_weights())
    mean = PosteriorMean(model).predict(IMAGES, verbose=0)
    np.testing.assert_allclose(mean, plain.predict(IMAGES, verbose=0), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet8_digits",
        "resnet8_batch_ensemble_digits",
        "resnet8_flipout_digits",
    ],
)
def test_contract(name):
    check_model(name)


# They differ from the above in size alone.
LARGER = {
    "resnet20_cifar10": "resnet8_digits",
    "resnet32_cifar10": "resnet8_digits",
    "resnet20_batch_ensemble_cifar10": "resnet8_batch_ensemble_digits",
    "resnet32_batch_ensemble_cifar10": "resnet8_batch_ensemble_digits",
}


@pytest.mark.slow
@pytest.mark.parametrize("name, other", LARGER.items())
def test_contract_of_larger_ones(name, other):
    small = {"input_shape": (8, 8, 1), "depth": 8, "scale": 1 / 16, "offset": 0.0}
    check_same_model(name, other, **small)
