"""The perceptrons: classifiers, and those that predict means and variances."""

import keras
import numpy as np
import pytest

from harness import check_model
from kzoo.layers import DenseFlipout, from_bayesian
from kzoo.zoo import build, load
from kzoo.zoo.models.mlp import _BREAST_CANCER, _DIABETES, mlp, mlp_classifier
from kzoo.zoo.predictive import regression

X = np.random.default_rng(0).normal(3.0, 2.0, size=(6, 4)).astype("float32")


def value(x):
    return keras.ops.convert_to_numpy(x).astype("float64")


def test_equals_the_equations():
    mean, variance = [3.0, 2.0, 1.0, 0.0], [4.0, 1.0, 9.0, 2.0]
    model = mlp(
        4,
        targets=2,
        hidden=(5, 3),
        activation="tanh",
        input_mean=mean,
        input_variance=variance,
        loc=[10.0, -1.0],
        scale=[2.0, 0.1],
        floor=0.01,
    )
    rng = np.random.default_rng(1)
    for v in model.trainable_weights:
        v.assign(rng.normal(size=v.shape))
    h = (X - np.array(mean)) / np.sqrt(variance)
    for name in ("hidden0", "hidden1", "head"):
        kernel, bias = map(value, model.get_layer(name).weights)
        h = h @ kernel + bias
        h = h if name == "head" else np.tanh(h)
    found = model.predict(X, verbose=0)
    assert found.shape == (6, 2, 2)
    scale = np.array([2.0, 0.1])
    np.testing.assert_allclose(
        found[..., 0], np.array([10.0, -1.0]) + scale * h[:, :2], rtol=1e-4
    )
    expected = scale**2 * (np.log1p(np.exp(h[:, 2:])) + 0.01)
    np.testing.assert_allclose(found[..., 1], expected, rtol=1e-4)


def test_the_classifiers_logits_equal_the_equations():
    model = mlp_classifier(
        4, 3, hidden=(5,), input_mean=[1.0] * 4, input_variance=[4.0] * 4
    )
    rng = np.random.default_rng(1)
    for v in model.trainable_weights:
        v.assign(rng.normal(size=v.shape))
    kernels = [map(value, model.get_layer(n).weights) for n in ("hidden0", "logits")]
    (w, b), (v, c) = kernels
    expected = np.maximum((X - 1) / 2 @ w + b, 0) @ v + c
    np.testing.assert_allclose(model.predict(X, verbose=0), expected, rtol=1e-4)


def test_inputs_go_in_as_they_are_without_statistics():
    model = mlp(4, hidden=())
    kernel, bias = map(value, model.get_layer("head").weights)
    found = model.predict(X, verbose=0)[:, 0, 0]
    np.testing.assert_allclose(found, (X @ kernel + bias)[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_mean": [0.0] * 4},
        {"input_variance": [1.0] * 4},
        {"input_mean": [0.0] * 3, "input_variance": [1.0] * 3},
    ],
)
def test_half_of_the_statistics_is_refused(arguments):
    with pytest.raises(ValueError, match="of 4 numbers each.*Received: input_mean="):
        mlp(4, **arguments)
    with pytest.raises(ValueError, match="of 4 numbers each.*Received: input_mean="):
        mlp_classifier(4, 2, **arguments)


@pytest.mark.parametrize(
    "arguments", [{"features": 0}, {"targets": 0}, {"hidden": (8, 0)}]
)
def test_sizes_that_are_none_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 1. Received"):
        mlp(**{"features": 4, **arguments})


def test_a_number_of_classes_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`classes`.*at least 1. Received"):
        mlp_classifier(4, classes=0)


def test_flipout_version_is_the_plain_one_at_the_mean_of_its_weights():
    model = build("mlp_regressor_flipout", num_examples=7, stddev=0.2, prior_stddev=3.0)
    layers = [x for x in model.layers if isinstance(x, DenseFlipout)]
    assert [x.name for x in layers] == ["hidden0", "hidden1", "head"]
    for layer in layers:
        assert layer.num_examples == 7
        np.testing.assert_allclose(value(layer.kernel_posterior.stddev()), 0.2, 1e-4)
        np.testing.assert_allclose(value(layer.kernel_prior.stddev()), 3.0)
    plain = build("mlp_regressor")
    plain.set_weights(from_bayesian(model).get_weights())
    x = np.random.default_rng(2).normal(50, 20, size=(3, 10)).astype("float32")
    expected = plain.predict(x, verbose=0)
    found = regression(model)(x)
    np.testing.assert_allclose(value(found["mean"]), expected[..., 0], rtol=1e-4)
    np.testing.assert_allclose(value(found["variance"]), expected[..., 1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mlp_classifier", "mlp_regressor", "mlp_regressor_flipout"]
)
def test_contract(name):
    check_model(name)


@pytest.mark.tensorflow
def test_the_diabetes_models_know_their_training_split():
    examples, _ = load("diabetes", "train")
    x, y = (np.array(a) for a in zip(*examples.as_numpy_iterator(), strict=True))
    np.testing.assert_allclose(_DIABETES["input_mean"], x.mean(0), rtol=1e-3)
    np.testing.assert_allclose(_DIABETES["input_variance"], x.var(0), rtol=1e-3)
    np.testing.assert_allclose(_DIABETES["loc"], y.mean(), rtol=1e-3)
    np.testing.assert_allclose(_DIABETES["scale"], y.std(), rtol=1e-2)


@pytest.mark.tensorflow
def test_the_breast_cancer_model_knows_its_training_split():
    examples, _ = load("breast_cancer", "train")
    x = np.array([x for x, _ in examples.as_numpy_iterator()])
    mean, variance = x.mean(0), x.var(0)
    np.testing.assert_allclose(_BREAST_CANCER["input_mean"], mean, rtol=1e-3)
    np.testing.assert_allclose(_BREAST_CANCER["input_variance"], variance, rtol=1e-3)
