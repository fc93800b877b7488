"""The metrics that average one value an example, against explicit float64."""

import keras
import numpy as np
import pytest

from harness import check_metric
from kzoo.zoo.metrics import (
    BrierScore,
    EnsembleNegativeLogLikelihood,
    MutualInformation,
    PredictiveEntropy,
)

N, M, C = 40, 3, 4
RNG = np.random.default_rng(0)
LOGITS = 2 * RNG.normal(size=(N, M, C))
LABELS = RNG.integers(0, C, N)
WEIGHTS = RNG.uniform(0, 2, N)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(p):
    return -(p * np.log(p)).sum(-1)


def brier(p, y):
    return ((p.mean(1) - np.eye(C)[y]) ** 2).sum(-1)


def nll(p, y):
    return -np.log(p.mean(1)[np.arange(len(y)), y])


def total(p, y):
    return entropy(p.mean(1))


def information(p, y):
    return entropy(p.mean(1)) - entropy(p).mean(1)


METRICS = {
    BrierScore: brier,
    EnsembleNegativeLogLikelihood: nll,
    PredictiveEntropy: total,
    MutualInformation: information,
}
all_metrics = pytest.mark.parametrize(("metric", "explicit"), METRICS.items())


def measure(metric, labels, predictions, weights=None, batch=N, **kwargs):
    metric = metric(**kwargs)
    predictions = np.asarray(predictions, "float32")
    for i in range(0, len(predictions), batch):
        rows = slice(i, i + batch)
        w = None if weights is None else weights[rows]
        metric.update_state(labels[rows], predictions[rows], w)
    return float(metric.result())


@all_metrics
def test_equals_explicit_formula(metric, explicit):
    probs = softmax(LOGITS)
    expected = explicit(probs, LABELS).mean()
    assert measure(metric, LABELS, probs) == pytest.approx(expected, rel=1e-5)
    value = measure(metric, LABELS, LOGITS, from_logits=True)
    assert value == pytest.approx(expected, rel=1e-5)


@all_metrics
def test_streaming_equals_the_whole(metric, explicit):
    expected = explicit(softmax(LOGITS), LABELS).mean()
    value = measure(metric, LABELS, LOGITS, batch=7, from_logits=True)
    assert value == pytest.approx(expected, rel=1e-5)


@all_metrics
def test_weights(metric, explicit):
    expected = np.average(explicit(softmax(LOGITS), LABELS), weights=WEIGHTS)
    for w in (WEIGHTS, WEIGHTS[:, None]):
        value = measure(metric, LABELS, LOGITS, w, batch=9, from_logits=True)
        assert value == pytest.approx(expected, rel=1e-5)


@all_metrics
def test_one_hot_and_column_labels(metric, explicit):
    expected = measure(metric, LABELS, LOGITS, from_logits=True)
    for labels in (np.eye(C)[LABELS], LABELS[:, None]):
        value = measure(metric, labels, LOGITS, from_logits=True)
        assert value == pytest.approx(expected, rel=1e-6)


@all_metrics
def test_one_model_is_an_ensemble_of_one(metric, explicit):
    probs = softmax(LOGITS[:, 0])
    expected = explicit(probs[:, None], LABELS).mean()
    assert measure(metric, LABELS, probs) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@all_metrics
def test_refuses_bad_shapes(metric, explicit):
    with pytest.raises(ValueError, match=r"\[B, M, C\].*Received.*\(2,\)"):
        metric().update_state([0, 1], [0.5, 0.5])


@all_metrics
def test_in_evaluate(metric, explicit):
    model = keras.Sequential([keras.Input((M, C)), keras.layers.Activation("linear")])
    model.compile(
        loss=lambda y, predictions: keras.ops.mean(predictions),
        metrics=[metric(from_logits=True, name="value")],
    )
    logs = model.evaluate(
        LOGITS.astype("float32"), LABELS, batch_size=16, verbose=0, return_dict=True
    )
    expected = explicit(softmax(LOGITS), LABELS).mean()
    assert logs["value"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@all_metrics
def test_contract(metric, explicit):
    check_metric(metric, {"from_logits": True}, LABELS, LOGITS.astype("float32"))


def test_brier_of_certain_predictions():
    assert measure(BrierScore, np.array([0, 1]), np.eye(2)) == 0
    assert measure(BrierScore, np.array([1, 0]), np.eye(2)) == 2
    uniform = measure(BrierScore, LABELS, np.full((N, C), 1 / C))
    assert uniform == pytest.approx(1 - 1 / C)


def test_nll_of_uniform_predictions_is_log_c():
    value = measure(EnsembleNegativeLogLikelihood, LABELS, np.full((N, M, C), 1 / C))
    assert value == pytest.approx(np.log(C))


def test_nll_of_the_mean_is_below_the_mean_nll():
    ensemble = measure(EnsembleNegativeLogLikelihood, LABELS, LOGITS, from_logits=True)
    members = [
        measure(EnsembleNegativeLogLikelihood, LABELS, LOGITS[:, m], from_logits=True)
        for m in range(M)
    ]
    assert ensemble < np.mean(members)


def test_nll_from_logits_does_not_underflow():
    # Both members give the label exp(-200), which float32 cannot hold.
    logits = np.array([[[0.0, 200.0], [0.0, 200.0]]])
    value = measure(
        EnsembleNegativeLogLikelihood, np.array([0]), logits, from_logits=True
    )
    assert value == pytest.approx(200)


def test_nll_from_probabilities_is_capped():
    value = measure(EnsembleNegativeLogLikelihood, np.array([0]), [[[0.0, 1.0]]])
    assert value == pytest.approx(-np.log(np.finfo("float32").tiny))


def test_nll_of_minus_infinite_logits():
    logits = np.array([[[0.0, -np.inf]], [[0.0, 0.0]]])
    value = measure(
        EnsembleNegativeLogLikelihood, np.array([0, 1]), logits, from_logits=True
    )
    assert value == pytest.approx(np.log(2) / 2)


def test_information_bounds():
    certain = np.tile(np.eye(C)[None, :M], (N, 1, 1))  # M members, M answers
    value = measure(MutualInformation, LABELS, certain)
    assert value == pytest.approx(np.log(M), rel=1e-5)
    agreeing = np.repeat(softmax(LOGITS)[:, :1], M, 1)
    assert measure(MutualInformation, LABELS, agreeing) == pytest.approx(0, abs=1e-6)
    assert measure(PredictiveEntropy, LABELS, agreeing) > 0.1


@pytest.mark.parametrize("metric", (BrierScore, EnsembleNegativeLogLikelihood))
@pytest.mark.parametrize("label", (-1, 2, 7))
def test_a_label_that_is_no_class_gives_nan(metric, label):
    value = measure(metric, np.array([0, label]), [[0.7, 0.3], [0.5, 0.5]])
    assert np.isnan(value)


@pytest.mark.parametrize("metric", (BrierScore, EnsembleNegativeLogLikelihood))
def test_refuses_another_number_of_labels(metric):
    with pytest.raises(ValueError, match="Received: 1 and 2"):
        metric().update_state([0], [[0.7, 0.3], [0.5, 0.5]])


@all_metrics
def test_an_empty_batch_counts_nothing(metric, explicit):
    metric = metric()
    metric.update_state(np.zeros(0, "int32"), np.zeros((0, 2), "float32"))
    assert float(metric.result()) == 0
