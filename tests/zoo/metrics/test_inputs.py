"""What the metrics make of labels that are NaN or no class, compiled or not."""

import keras
import numpy as np
import pytest

from harness.backends import compiled
from kzoo.zoo.metrics import (
    BrierScore,
    EnsembleNegativeLogLikelihood,
    ExpectedCalibrationError,
    MutualInformation,
    PredictiveEntropy,
)

PROBS = np.array([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]], "float32")
ADAPTIVE = {"adaptive": True}
LABELLED = [
    (BrierScore, {}),
    (EnsembleNegativeLogLikelihood, {}),
    (ExpectedCalibrationError, {}),
    (ExpectedCalibrationError, ADAPTIVE),
]
BAD = {
    "NaN": np.array([0, np.nan, 1], "float32"),
    "no class": np.array([0, 2, 1]),
    "between two": np.array([0, 0.5, 1], "float32"),
    "NaN in a row": np.array([[1, 0], [0, np.nan], [0, 1]], "float32"),
}


def graph(function):
    import tensorflow as tf

    return tf.function(function)


def value(metric, how, *batch):
    """The result after one batch, its update and result in one function."""

    def run(*batch):
        state = [v.value for v in metric.variables]
        return metric.stateless_result(metric.stateless_update_state(state, *batch))

    return float(how(run)(*map(keras.ops.convert_to_tensor, batch)))


how = pytest.mark.parametrize(
    "how", [compiled, pytest.param(graph, marks=pytest.mark.tensorflow)]
)
labelled = pytest.mark.parametrize(("metric", "kwargs"), LABELLED)
bad = pytest.mark.parametrize("kind", BAD)


@pytest.mark.slow
@how
@labelled
@bad
def test_such_a_label_gives_nan(metric, kwargs, how, kind):
    metric = metric(**kwargs)
    metric.update_state(BAD[kind], PROBS)
    assert np.isnan(metric.result())
    metric.reset_state()
    assert np.isnan(value(metric, how, BAD[kind], PROBS))


@pytest.mark.slow
@how
@pytest.mark.parametrize(
    ("metric", "kwargs"), [*LABELLED, (PredictiveEntropy, {}), (MutualInformation, {})]
)
def test_with_weight_zero_an_example_is_absent(metric, kwargs, how):
    metric, labels, weights = metric(**kwargs), BAD["NaN"], np.array([1, 0, 1])
    metric.update_state(labels[[0, 2]], PROBS[[0, 2]])
    expected = pytest.approx(float(metric.result()))
    for probs in (PROBS, np.where([[False], [True], [False]], np.nan, PROBS)):
        metric.reset_state()
        assert value(metric, how, labels, probs, weights) == expected
        metric.update_state(labels, probs, weights)
        assert float(metric.result()) == expected


@pytest.mark.parametrize(
    ("metric", "kwargs"), [*LABELLED, (PredictiveEntropy, {}), (MutualInformation, {})]
)
def test_a_weight_below_zero_gives_nan(metric, kwargs):
    metric = metric(**kwargs)
    metric.update_state(np.array([0, 1, 1]), PROBS, np.array([1, -1, 2]))
    assert np.isnan(metric.result())


@how
@pytest.mark.parametrize("metric", [PredictiveEntropy, MutualInformation])
def test_metrics_of_predictions_alone_do_not_read_labels(metric, how):
    assert np.isfinite(value(metric(), how, BAD["NaN"], PROBS))


@how
@labelled
def test_right_labels_give_the_same_compiled(metric, kwargs, how):
    metric, labels = metric(**kwargs), np.array([0, 1, 1])
    found = value(metric, how, labels, PROBS)
    metric.update_state(labels, PROBS)
    assert found == pytest.approx(float(metric.result()), rel=1e-5)
