"""ResNet-50: Keras's own, with its weights; its size; as an ensemble."""

import keras
import numpy as np
import pytest

from harness import check_model
from harness.by_hand import randomize, softmax, value
from kzoo.zoo import build
from kzoo.zoo.models.batch_ensemble import batch_ensemble
from kzoo.zoo.models.bottleneck_resnet import bottleneck_resnet
from kzoo.zoo.predictive import classification

SMALL = {"input_shape": (32, 32, 3), "classes": 5, "blocks": (1, 1), "width": 8}
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype("float32")


def keras_resnet50():
    """Keras's, with strides where they are today, and all weights random."""
    model = keras.applications.ResNet50(
        weights=None, input_shape=(32, 32, 3), classes=7, classifier_activation=None
    )

    def clone(layer):
        config = layer.get_config()
        if layer.name.endswith("_block1_1_conv"):
            config["strides"] = 1
        if layer.name.endswith("_block1_2_conv") and layer.name[4] in "345":
            config["strides"] = 2
        return type(layer).from_config(config)

    model = keras.models.clone_model(model, clone_function=clone)
    randomize(model)
    return model


def twin(name):
    """What Keras calls a layer."""
    if name == "logits":
        return "predictions"
    if name.startswith("stem"):
        return name.replace("stem", "conv1")
    stage, block, part, kind = name.split("_")
    part = {"shortcut": "0"}.get(part, part)
    return f"conv{int(stage[5:]) + 2}_block{int(block[5:]) + 1}_{part}_{kind}"


@pytest.mark.slow
@pytest.mark.tensorflow  # Fifty layers take JAX minutes to compile.
def test_equals_keras_with_its_weights():
    def convolution(*args, **kwargs):
        return keras.layers.Conv2D(*args, **{**kwargs, "kernel_initializer": "zeros"})

    expected = keras_resnet50()
    model = build(
        "resnet50_imagenet2012",
        input_shape=(32, 32, 3),
        classes=7,
        scale=0.01,
        offset=-1.0,
        conv=convolution,
    )
    biases = {}
    for layer in model.layers:
        if not layer.weights:
            continue
        weights = expected.get_layer(twin(layer.name)).get_weights()
        if layer.name.endswith("_conv"):
            biases[layer.name[:-5]] = weights.pop()
        if layer.name.endswith("_bn"):
            weights[2] = weights[2] - biases[layer.name[:-3]]  # of the moving mean
        layer.set_weights(weights)
    assert len(biases) == 53
    found, expected_logits = model(IMAGES), expected(IMAGES * 0.01 - 1.0)
    np.testing.assert_allclose(found, expected_logits, rtol=1e-3, atol=1e-3)
    assert np.ptp(found, axis=0).min() > 0.01
    # Keras's biases, which normalizations take away again, are what it has more.
    more = sum(len(bias) for bias in biases.values())
    assert expected.count_params() - model.count_params() == more == 26_560
    of_paper = model.count_params() + (1000 - 7) * 2049
    assert of_paper == 25_610_152
    assert of_paper - 2 * 26_560 == 25_557_032  # without the moving averages


@pytest.mark.tensorflow  # Sizes are the same on JAX.
def test_is_half_the_resolution_five_times():
    shape = (224, 224, 3)
    model = bottleneck_resnet(shape, classes=3, blocks=(1, 1, 1, 1), width=1)
    names = ["stem_conv", "stem_pool", *(f"stage{i}_block0_relu" for i in range(4))]
    sizes = [model.get_layer(name).output.shape[1] for name in names]
    assert sizes == [112, 56, 56, 28, 14, 7]
    assert model.get_layer("stage3_block0_relu").output.shape[-1] == 4 * 2**3


def test_penalty_on_kernels_only():
    model = bottleneck_resnet(**SMALL, l2=1e-2)
    randomize(model)
    kernels = [v for v in model.weights if v.path.endswith("kernel")]
    assert len(kernels) == 1 + 2 * 4 + 1
    expected = 1e-2 * sum((value(v) ** 2).sum() for v in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


def test_normalizations_are_torchs_and_a_factorys():
    made = []

    def normalization(**kwargs):
        made.append(keras.layers.BatchNormalization(**kwargs))
        return made[-1]

    bottleneck_resnet(**SMALL, normalization=normalization)
    assert len(made) == 1 + 2 * 4
    assert {(x.momentum, x.epsilon) for x in made} == {(0.9, 1e-5)}


def test_members_are_networks_with_their_own_kernels():
    # Member m is the single network with the kernels W * (r_m s_m^T).
    ensemble = bottleneck_resnet(**SMALL, **batch_ensemble(2, -0.5))
    single = bottleneck_resnet(**SMALL)
    randomize(ensemble)
    probs = []
    for m in range(2):
        for layer in single.layers:
            other = ensemble.get_layer(layer.name)
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.set_weights(other.get_weights())
            elif layer.weights:
                alpha, gamma = value(other.alpha)[m], value(other.gamma)[m]
                layer.kernel.assign(value(other.kernel) * alpha[:, None] * gamma)
                if other.use_bias:
                    layer.bias.assign(value(other.bias)[m])
        probs.append(softmax(value(single.predict(IMAGES, verbose=0))))
    found = value(classification(ensemble)[1](IMAGES)["member_probabilities"])
    np.testing.assert_allclose(found, np.stack(probs, 1), rtol=1e-3, atol=1e-5)
    assert np.abs(found[:, 0] - found[:, 1]).max() > 1e-2


@pytest.mark.parametrize(
    "change", [{"blocks": (1, 0)}, {"width": 0}, {"ensemble_size": 0}]
)
def test_no_number_is_refused(change):
    with pytest.raises(ValueError, match=f"Received: {[*change][0]}=0"):
        bottleneck_resnet(**{**SMALL, **change})


@pytest.mark.slow
def test_contract():
    check_model("resnet50_imagenet2012", **{**SMALL, "blocks": (1,)})
