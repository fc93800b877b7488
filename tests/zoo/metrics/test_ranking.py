"""Metrics of an order against sorts, scikit-learn, hand cases and their bounds."""

import keras
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from harness import check_metric
from kzoo.zoo.metrics import (
    AreaUnderRiskCoverage,
    CoverageAtRisk,
    OutOfDistributionAUROC,
    OutOfDistributionFPR,
    RiskAtCoverage,
)
from kzoo.zoo.metrics.ranking import SCORES, cells, uncertainty

RNG = np.random.default_rng(0)
SELECTIVE = [AreaUnderRiskCoverage, CoverageAtRisk, RiskAtCoverage]
DETECTION = [OutOfDistributionAUROC, OutOfDistributionFPR]


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def value(metric, y_true, y_pred, weight=None):
    metric.update_state(y_true, y_pred, weight)
    return float(metric.result())


def two_classes(odds):
    """Logits whose class 0 is the most probable, with these odds against it."""
    return np.stack([-np.log(odds), 0 * odds], -1).astype("float32")


def distinct(n):
    """Uncertain predictions of their own cell each, and which are wrong, mostly last.

    Log-odds from -e^4 to -e^-1, at least 2 % apart; shuffled.
    """
    log_odds = -np.exp(np.linspace(4, -1, n))
    wrong = RNG.uniform(size=n) < np.linspace(0.05, 0.5, n)
    order = RNG.permutation(n)
    return (
        wrong[order].astype(int),
        two_classes(np.exp(log_odds[order])),
        np.argsort(log_odds[order]),
    )


def detection(n, shift=1.0, seed=0):
    """Raw scores, larger for the third that is out of distribution."""
    rng = np.random.default_rng(seed)
    out = (np.arange(n) % 3 == 0).astype(int)
    return out, (rng.normal(size=n) + shift * out).astype("float32")


def fpr(out, scores, recall=0.95):
    false, true, _ = roc_curve(out, scores, drop_intermediate=False)
    return false[np.argmax(true >= recall)]


def risks(wrong, order):
    """R(i/N) for i = 1 ... N."""
    return np.cumsum(wrong[order]) / np.arange(1, len(wrong) + 1)


def area(wrong, order, generalized):
    """The area under the curve whose errors lie on straight lines, by fine sums."""
    n, fine = len(wrong), 2000
    errors = np.concatenate([[0], np.cumsum(wrong[order])]) / n
    c = (np.arange(n * fine) + 0.5) / (n * fine)
    e = np.interp(c, np.arange(n + 1) / n, errors)
    return np.mean(e if generalized else e / c)


@pytest.mark.parametrize("generalized", [False, True])
def test_areas_are_those_of_the_definition(generalized):
    wrong, logits, order = distinct(50)
    metric = AreaUnderRiskCoverage(generalized, from_logits=True)
    found = value(metric, wrong, logits)
    assert found == pytest.approx(area(wrong, order, generalized), abs=1e-5)
    r = risks(wrong, order) * (np.arange(1, 51) / 50 if generalized else 1)
    assert abs(found - r.mean()) < (1 + np.log(50)) / 50


def test_areas_by_hand():
    # Right, wrong, right: N E(c) is 0, then N c - 1, then 1.
    wrong, logits = [0, 1, 0], two_classes(np.array([0.1, 0.4, 0.9]))
    found = value(AreaUnderRiskCoverage(from_logits=True), wrong, logits)
    assert found == pytest.approx((1 - np.log(2) + np.log(1.5)) / 3, abs=1e-6)
    found = value(AreaUnderRiskCoverage(True, from_logits=True), wrong, logits)
    assert found == pytest.approx((0.5 + 1) / 9, abs=1e-6)


@pytest.mark.parametrize("generalized, expected", [(False, 1.0), (True, 0.5)])
def test_areas_where_all_is_wrong_or_nothing(generalized, expected):
    _, logits, _ = distinct(20)
    for label, area in ((1, expected), (0, 0.0)):
        metric = AreaUnderRiskCoverage(generalized, from_logits=True)
        assert value(metric, np.full(20, label), logits) == pytest.approx(area)


def test_equal_scores_are_in_no_order():
    # Three errors of four, alike: E grows evenly, in whatever order they come.
    for wrong in ([0, 1, 1, 1], [1, 1, 1, 0]):
        logits = two_classes(np.full(4, 0.25))
        found = value(AreaUnderRiskCoverage(from_logits=True), wrong, logits)
        assert found == pytest.approx(0.75)
        assert value(RiskAtCoverage(0.25, from_logits=True), wrong, logits) == 0.75
        assert value(CoverageAtRisk(0.5, from_logits=True), wrong, logits) == 0
        assert value(CoverageAtRisk(0.75, from_logits=True), wrong, logits) == 1


@pytest.mark.parametrize("level", [0.05, 0.3, 0.5, 0.77, 1.0])
def test_risk_at_a_coverage_and_coverage_at_a_risk(level):
    wrong, logits, order = distinct(60)
    r = risks(wrong, order)
    found = value(RiskAtCoverage(level, from_logits=True), wrong, logits)
    assert found == pytest.approx(r[int(np.ceil(level * 60 - 1e-9)) - 1], abs=1e-6)
    for risk in (level / 3, r[int(20 * level)]):  # The second one is met exactly.
        found = value(CoverageAtRisk(float(risk), from_logits=True), wrong, logits)
        expected = np.max(np.flatnonzero(r <= risk + 1e-12) + 1, initial=0) / 60
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_detection_of_distinct_scores_is_exact(seed):
    rng = np.random.default_rng(seed)
    scores = np.exp(rng.permutation(np.arange(-60, 60)) / 50)
    scores = np.where(np.arange(120) % 4 == 0, -scores, scores).astype("float32")
    out = (rng.uniform(size=120) < 1 / (1 + np.exp(-scores))).astype(int)
    found = value(OutOfDistributionAUROC("raw"), out, scores)
    assert found == pytest.approx(roc_auc_score(out, scores), abs=1e-6)
    for recall in (0.5, 0.95, 1.0):
        found = value(OutOfDistributionFPR(recall, "raw"), out, scores)
        assert found == pytest.approx(fpr(out, scores, recall), abs=1e-6)


def test_a_recall_that_is_met_exactly():
    # 19 of 20 is a recall of 0.95, though none of the numbers is exact.
    scores = np.exp(np.arange(40) / 10)
    out = np.arange(40) % 2 == 0
    scores[0] = 0.0
    found = value(OutOfDistributionFPR(0.95, "raw"), out, scores)
    assert found == pytest.approx(fpr(out, scores)) == 0.95


def test_ties_count_half():
    out, scores = np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 2.0, 3.0])
    # Of four pairs three are in order and one is tied.
    assert value(OutOfDistributionAUROC("raw"), out, scores) == pytest.approx(0.875)
    # Both kinds at 2: a threshold takes them together.
    assert value(OutOfDistributionFPR(0.95, "raw"), out, scores) == 0.5


def test_auroc_is_within_its_bound():
    out, scores = detection(4000)
    metric = OutOfDistributionAUROC("raw")
    found = value(metric, out, scores)
    b, a = numpy(metric.with_event), numpy(metric.without)
    bound = (a * b).sum() / (2 * a.sum() * b.sum())
    assert abs(found - roc_auc_score(out, scores)) <= bound + 1e-6
    assert 1e-5 < bound < 3e-3
    fpr_found = value(OutOfDistributionFPR(score="raw"), out, scores)
    exact = fpr(out, scores)
    assert exact - 1e-6 <= fpr_found <= exact + a.max() / a.sum() + 1e-6


@pytest.mark.parametrize("generalized", [False, True])
def test_areas_are_within_their_bounds(generalized):
    n, rng = 3000, np.random.default_rng(1)
    log_odds = -rng.uniform(1, 2, n)
    wrong = (rng.uniform(size=n) < 1 / (1 + np.exp(-log_odds))).astype(int)
    metric = AreaUnderRiskCoverage(generalized, from_logits=True)
    found = value(metric, wrong, two_classes(np.exp(log_odds)))
    e, w = numpy(metric.with_event), numpy(metric.with_event + metric.without)
    assert w.max() > 20  # Many in a cell.
    below = np.cumsum(w) - w
    spread = e * (w - e)
    if generalized:
        bound = spread.sum() / (2 * n**2)
    else:
        first = below == 0
        bound = (w[first].sum() + (spread[~first] / (2 * below[~first])).sum()) / n
    exact = area(wrong, np.argsort(log_odds), generalized)
    assert abs(found - exact) <= bound + 1e-5
    assert bound < 0.06


def test_cells_are_in_the_order_of_the_scores():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=5000) * 10.0 ** rng.integers(-37, 37, 5000)
    scores = np.concatenate([scores, [-np.inf, np.inf, -0.0, 0.0, 3e38, -1e-37]])
    scores = np.sort(scores.astype("float32"))
    found = numpy(cells(scores))
    assert found.min() >= 0 and found.max() < 65536
    assert (np.diff(found) >= 0).all()
    assert numpy(cells(np.float32([-0.0, 0.0]))).tolist() == [32768, 32768]
    # Equal cells are equal to 0.8 %, and 0.8 % apart are different ones.
    for sign in (1, -1):
        x = np.float32(sign * np.exp(rng.uniform(-5, 5, 200)))
        assert (numpy(cells(x)) != numpy(cells(x * np.float32(1.0079)))).all()
        assert abs(numpy(cells(x)) - numpy(cells(x * np.float32(1.0038)))).max() == 1


def test_uncertainty_of_members():
    logits = RNG.normal(size=(6, 3, 4)).astype("float32")
    members = np.exp(logits.astype("float64"))
    members /= members.sum(-1, keepdims=True)
    p = members.mean(1)
    entropy = -(p * np.log(p)).sum(-1)
    expected = {
        "max_probability": np.log(1 - p.max(-1)) - np.log(p.max(-1)),
        "entropy": entropy,
        "mutual_information": entropy + (members * np.log(members)).sum(-1).mean(1),
    }
    for score in SCORES:
        for y_pred, from_logits in ((logits, True), (members, False)):
            found = numpy(uncertainty(y_pred, score, from_logits))
            np.testing.assert_allclose(found, expected[score], rtol=1e-4, atol=1e-6)
    found = numpy(uncertainty(p, "max_probability", False))
    np.testing.assert_allclose(found, expected["max_probability"], rtol=1e-5)


def test_confidences_close_to_one_are_told_apart():
    rest = np.float32([1e-12, 1e-10, 1e-9])  # 1 - rest is 1 in float32.
    probs = np.stack([np.ones(3, "float32"), rest, 0 * rest], -1)
    found = numpy(uncertainty(probs, "max_probability", False))
    np.testing.assert_allclose(found, np.log(rest), rtol=1e-5)


@pytest.mark.parametrize("metric_class", SELECTIVE + DETECTION)
def test_nan_gives_nan_and_weight_zero_is_absent(metric_class):
    y_pred = np.float32([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.5, 0.5]])
    y_true = np.array([0.0, 1.0, 0.0, 1.0])
    expected = value(metric_class(), y_true[:3], y_pred[:3])
    bad = [(y_true, np.where(np.arange(4)[:, None] == 3, np.nan, y_pred))]
    labels = (2, -1, 0.5)
    bad += [(np.where(np.arange(4) == 3, label, y_true), y_pred) for label in labels]
    for labels, predictions in bad:
        assert np.isnan(value(metric_class(), labels, predictions))
        weight = np.float32([1, 1, 1, 0])
        found = value(metric_class(), labels, predictions, weight)
        assert found == pytest.approx(expected)
    negative = np.float32([1, 1, 1, -0.5])
    assert np.isnan(value(metric_class(), y_true, y_pred, negative))


@pytest.mark.parametrize("metric_class", SELECTIVE + DETECTION)
def test_an_empty_batch_counts_nothing_and_one_kind_alone_is_not_ranked(metric_class):
    metric = metric_class()
    assert value(metric, np.zeros(0, "int32"), np.zeros((0, 2), "float32")) == 0
    if metric_class in DETECTION:
        for label in (0, 1):
            metric = metric_class()
            assert np.isnan(value(metric, [label], [[0.7, 0.3]]))
            assert np.isfinite(value(metric, [1 - label], [[0.7, 0.3]]))


@pytest.mark.parametrize("metric_class", SELECTIVE + DETECTION)
def test_columns_and_other_dtypes_of_labels_give_the_same(metric_class):
    y_pred = RNG.dirichlet(np.ones(2), 30)
    y_true = RNG.integers(0, 2, 30)
    expected = value(metric_class(), y_true, y_pred)
    kinds = [y_true[:, None], y_true.astype("float32")]
    kinds += [y_true.astype(bool)] if metric_class in DETECTION else [np.eye(2)[y_true]]
    for labels in kinds:
        assert value(metric_class(), labels, y_pred) == pytest.approx(expected)
    members = y_pred[:, None]
    assert value(metric_class(), y_true, members) == pytest.approx(expected)


def test_what_does_not_fit_is_refused():
    for metric_class, name in (
        (CoverageAtRisk, "risk"),
        (RiskAtCoverage, "coverage"),
        (OutOfDistributionFPR, "recall"),
    ):
        for bad in (-0.1, 1.1, "0.5"):
            with pytest.raises(ValueError, match=f"`{name}`.*Received: {name}="):
                metric_class(bad)
    for metric_class in SELECTIVE:
        with pytest.raises(ValueError, match="`score`.*Received: score='raw'"):
            metric_class(score="raw")
    with pytest.raises(ValueError, match=r"y_true with shape \(2, 2\)"):
        OutOfDistributionAUROC().update_state(np.eye(2), np.eye(2))
    with pytest.raises(ValueError, match="with 2 rows"):
        OutOfDistributionAUROC().update_state([0], np.eye(2))
    with pytest.raises(ValueError, match=r"one score an example.*\(2, 2\)"):
        OutOfDistributionAUROC("raw").update_state([0, 1], np.eye(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "metric_class, arguments",
    [
        (AreaUnderRiskCoverage, {"generalized": True, "score": "entropy"}),
        (CoverageAtRisk, {"risk": 0.4, "score": "mutual_information"}),
        (RiskAtCoverage, {"coverage": 0.5, "score": "entropy"}),
        (OutOfDistributionAUROC, {"score": "max_probability"}),
        (OutOfDistributionFPR, {"recall": 0.6, "score": "mutual_information"}),
    ],
)
def test_contract(metric_class, arguments):
    members = np.random.default_rng(3).normal(size=(20, 3, 2))
    labels = np.random.default_rng(4).integers(0, 2, 20)
    check_metric(metric_class, {**arguments, "from_logits": True}, labels, members)
