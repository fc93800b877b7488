import keras
import numpy as np
import pytest
import scipy.special
import scipy.stats
from keras import ops

from harness.backends import compiled, gradients
from kzoo.layers.ops.uncertainty import (
    ensemble_log_probs,
    entropy,
    mutual_information,
    predictive_entropy,
)


def values(tensor):
    return ops.convert_to_numpy(tensor)


def members(*shape, scale=2.0):
    logits = scale * np.random.default_rng(0).normal(size=shape)
    return scipy.special.softmax(logits, -1).astype("float32")


def test_entropy_by_hand():
    probs = np.array([[0.5, 0.25, 0.25], [1, 0, 0], [0, 0, 1], [1 / 3] * 3], "float32")
    expected = [1.5 * np.log(2), 0, 0, np.log(3)]
    np.testing.assert_allclose(values(entropy(probs)), expected, atol=1e-6)


def test_disagreement_by_hand():
    """Two certain members that disagree: all uncertainty is mutual information."""
    probs = np.array([[1.0, 0.0], [0.0, 1.0]], "float32")
    assert values(predictive_entropy(probs)) == pytest.approx(np.log(2), abs=1e-6)
    assert values(mutual_information(probs)) == pytest.approx(np.log(2), abs=1e-6)
    # Two that agree that nothing is certain: none of it is.
    probs = np.array([[0.5, 0.5], [0.5, 0.5]], "float32")
    assert values(predictive_entropy(probs)) == pytest.approx(np.log(2), abs=1e-6)
    assert values(mutual_information(probs)) == 0
    # H[(0.6, 0.4)] - (H[(0.9, 0.1)] + H[(0.3, 0.7)]) / 2
    probs = np.array([[0.9, 0.1], [0.3, 0.7]], "float32")
    assert values(predictive_entropy(probs)) == pytest.approx(0.673012, abs=1e-6)
    assert values(mutual_information(probs)) == pytest.approx(0.205038, abs=1e-6)


def test_against_scipy():
    probs = members(7, 3, 5, 10)
    wide = probs.astype("float64")
    of_mean = scipy.stats.entropy(wide.mean(-2), axis=-1)
    of_members = scipy.stats.entropy(wide, axis=-1)
    np.testing.assert_allclose(values(entropy(probs)), of_members, atol=2e-6)
    np.testing.assert_allclose(values(predictive_entropy(probs)), of_mean, atol=2e-6)
    information = of_mean - of_members.mean(-1)
    assert information.min() > 0.01
    np.testing.assert_allclose(
        values(mutual_information(probs)), information, atol=4e-6
    )


def test_predictive_entropy_is_mutual_information_plus_mean_entropy():
    probs = members(200, 4, 10)
    total = values(mutual_information(probs)) + values(entropy(probs)).mean(-1)
    np.testing.assert_allclose(values(predictive_entropy(probs)), total, atol=1e-6)


@pytest.mark.parametrize("ensemble_size", (1, 3, 4, 7))
def test_mutual_information_bounds(ensemble_size):
    # Nearly certain members, whose rounding errors are largest beside their entropy.
    for scale in (1e-3, 1.0, 30.0):
        probs = members(500, ensemble_size, 10, scale=scale)
        information = values(mutual_information(probs))
        assert information.min() >= 0
        assert information.max() <= np.log(min(ensemble_size, 10)) + 1e-6
        same = np.repeat(probs[:, :1], ensemble_size, axis=1)
        information = values(mutual_information(same))
        assert information.min() >= 0
        assert information.max() < 1e-6


def test_order_of_members_and_classes_does_not_matter():
    probs = members(20, 4, 6)
    for function in (predictive_entropy, mutual_information):
        expected = values(function(probs))
        for other in (probs[:, ::-1], probs[:, :, ::-1]):
            np.testing.assert_allclose(values(function(other)), expected, atol=1e-6)


def test_ensemble_log_probs():
    logits = np.random.default_rng(1).normal(size=(5, 4, 10)).astype("float32")
    mean = scipy.special.softmax(logits.astype("float64"), -1).mean(-2)
    np.testing.assert_allclose(values(ensemble_log_probs(logits)), np.log(mean), 1e-5)
    # Log probabilities are logits of themselves.
    log_probs = scipy.special.log_softmax(logits, -1)
    np.testing.assert_allclose(
        values(ensemble_log_probs(log_probs)), np.log(mean), 1e-5
    )


def test_ensemble_log_probs_does_not_underflow():
    logits = np.array([[[0.0, -500.0], [0.0, -600.0]]], "float32")
    expected = [[0.0, -500.0 - np.log(2)]]
    np.testing.assert_allclose(values(ensemble_log_probs(logits)), expected, 1e-6)
    large = np.array([[[1e4, 0.0], [0.0, 1e4]]], "float32")
    np.testing.assert_allclose(
        values(ensemble_log_probs(large)), [[np.log(0.5)] * 2], 1e-6
    )


def test_gradients_are_right_and_finite_at_certainty():
    probs = members(3, 4, 5)
    (gradient,) = gradients(lambda p: ops.sum(entropy(p)), probs)
    np.testing.assert_allclose(gradient, -np.log(probs) - 1, atol=1e-5)
    (gradient,) = gradients(lambda p: ops.sum(mutual_information(p)), probs)
    expected = (np.log(probs) - np.log(probs.mean(-2, keepdims=True))) / 4
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    certain = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]], "float32")
    for function in (entropy, predictive_entropy, mutual_information):
        (gradient,) = gradients(lambda p, f=function: ops.sum(f(p)), certain)
        assert np.isfinite(gradient).all(), function
    (gradient,) = gradients(
        lambda x: ops.sum(ensemble_log_probs(x)), certain * 2000 - 1000
    )
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_half_precision_is_summed_in_float32(dtype):
    probs = ops.cast(members(50, 4, 300), dtype)
    wide = ops.convert_to_numpy(ops.cast(probs, "float32"))
    for function in (entropy, predictive_entropy, mutual_information):
        result = function(probs)
        assert keras.backend.standardize_dtype(result.dtype) == "float32"
        np.testing.assert_allclose(values(result), values(function(wide)), rtol=1e-6)
    assert keras.backend.standardize_dtype(ensemble_log_probs(probs).dtype) == "float32"


@pytest.mark.tensorflow
def test_float64_is_kept():
    probs = members(10, 4, 6).astype("float64")
    assert keras.backend.standardize_dtype(entropy(probs).dtype) == "float64"
    expected = scipy.stats.entropy(probs.mean(-2), axis=-1) - scipy.stats.entropy(
        probs, axis=-1
    ).mean(-1)
    np.testing.assert_allclose(
        values(mutual_information(probs / probs.sum(-1, keepdims=True))),
        expected,
        atol=1e-7,
    )


def test_equal_with_and_without_jit():
    probs = ops.convert_to_tensor(members(10, 4, 6))
    for function in (entropy, predictive_entropy, mutual_information):
        np.testing.assert_allclose(
            values(compiled(function)(probs)), values(function(probs)), atol=1e-6
        )
    np.testing.assert_allclose(
        values(compiled(ensemble_log_probs)(probs)),
        values(ensemble_log_probs(probs)),
        atol=1e-6,
    )
