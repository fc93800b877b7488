"""ExpectedCalibrationError against explicit float64 bins, hand cases and bounds."""

import keras
import numpy as np
import pytest

from harness import check_metric
from kzoo.zoo.metrics import ExpectedCalibrationError

RNG = np.random.default_rng(0)


def predictions(n, classes=5, sharpness=3.0, seed=0):
    """Returns labels that follow the probabilities only loosely, and those."""
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.normal(size=(n, classes))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = np.array(
        [
            rng.choice(classes, p=p)
            for p in probs**0.5 / (probs**0.5).sum(-1, keepdims=True)
        ]
    )
    return labels, probs.astype("float32")


def confidence_and_right(labels, probs):
    probs = probs.astype("float64")
    return probs.max(-1), (probs.argmax(-1) == labels).astype("float64")


def equal_width(labels, probs, bins, weights=None):
    """The definition, bin by bin, with the edges as float32 knows them."""
    confidence, right = confidence_and_right(labels, probs)
    weights = np.ones(len(labels)) if weights is None else weights
    edges = np.float32(np.arange(bins + 1) / bins).astype("float64")
    value, seen = 0.0, 0
    for b in range(bins):
        inside = (confidence > edges[b]) & (confidence <= edges[b + 1])
        inside |= (confidence == 0) & (b == 0)
        seen += inside.sum()
        if inside.any():
            w = weights[inside]
            accuracy = np.average(right[inside], weights=w)
            gap = accuracy - np.average(confidence[inside], weights=w)
            value += w.sum() / weights.sum() * abs(gap)
    assert seen == len(labels)  # each example once
    return value


def equal_mass(labels, probs, bins):
    """Bins of equal mass after a full sort, cutting single examples in two."""
    confidence, right = confidence_and_right(labels, probs)
    order = np.argsort(confidence, kind="stable")
    d = np.concatenate([[0], np.cumsum((right - confidence)[order])])
    at = np.interp(np.arange(bins + 1) * len(labels) / bins, np.arange(len(d)), d)
    return np.abs(np.diff(at)).sum() / len(labels)


def measure(labels, probs, weights=None, batch=None, **kwargs):
    metric = ExpectedCalibrationError(**kwargs)
    batch = batch or len(labels)
    for i in range(0, len(labels), batch):
        w = None if weights is None else weights[i : i + batch]
        metric.update_state(labels[i : i + batch], probs[i : i + batch], w)
    return float(metric.result())


def two_classes(confidences):
    """Rows [c, 1 - c] whose predicted class is 0."""
    c = np.asarray(confidences, "float32")
    return np.stack([c, 1 - c], -1)


@pytest.mark.parametrize("bins", [1, 15])
def test_equals_the_definition(bins):
    labels, probs = predictions(300)
    expected = equal_width(labels, probs, bins)
    assert measure(labels, probs, num_bins=bins) == pytest.approx(expected, abs=1e-6)
    assert expected > 0.05


def test_two_bins_by_hand():
    # Bin (0.5, 0.75]: 0.6 right, 0.7 wrong: |1/2 - 0.65| = 0.15, weight 2/6.
    # Bin (0.75, 1]: 0.8 wrong, 0.9 right, 1 right, 1 right: |3/4 - 0.925| = 0.175.
    probs = two_classes([0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    labels = np.array([0, 1, 1, 0, 0, 0])
    expected = 2 / 6 * 0.15 + 4 / 6 * 0.175
    assert measure(labels, probs, num_bins=4) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_perfect_calibration_is_zero(adaptive):
    # Of ten predictions with confidence k/10, k are right, for k = 6 ... 10.
    confidences = np.repeat([0.6, 0.7, 0.8, 0.9, 1.0], 10)
    labels = np.concatenate([np.arange(10) >= k for k in range(6, 11)]).astype(int)
    value = measure(labels, two_classes(confidences), num_bins=5, adaptive=adaptive)
    assert value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_certain_and_always_wrong_is_one(adaptive):
    labels, probs = np.ones(7, int), two_classes(np.ones(7))
    assert measure(labels, probs, adaptive=adaptive) == pytest.approx(1, abs=1e-6)


def test_confidence_on_an_edge_lies_in_the_lower_bin_and_only_there():
    # 0.6 = 3/5 closes bin 3 of 5; the right 0.6 and the wrong 0.61 stay apart:
    # together in a bin they would give |1/2 - 0.605|.
    labels, probs = np.array([0, 1]), two_classes([0.6, 0.61])
    expected = (abs(1 - 0.6) + abs(0 - 0.61)) / 2
    assert measure(labels, probs, num_bins=5) == pytest.approx(expected, abs=1e-6)
    # ... and 0.59 with 0.6 is together: |1 - 0.595|.
    value = measure(np.array([0, 0]), two_classes([0.59, 0.6]), num_bins=5)
    assert value == pytest.approx(1 - 0.595, abs=1e-6)


@pytest.mark.parametrize("bins", [10, 15])
def test_every_edge_counts_once(bins):
    edges = np.arange(1, bins + 1) / bins
    metric = ExpectedCalibrationError(num_bins=bins)
    # A single class: its probability is the confidence, whatever the sum.
    metric.update_state(np.zeros(bins, int), np.stack([edges, 0 * edges], -1))
    weight = keras.ops.convert_to_numpy(metric.weight)
    np.testing.assert_array_equal(weight, np.ones(bins))


@pytest.mark.parametrize("adaptive", [False, True])
def test_confidences_zero_and_one_count_once(adaptive):
    metric = ExpectedCalibrationError(num_bins=10, adaptive=adaptive)
    metric.update_state([0, 0], [[0.0, 0.0], [1.0, 0.0]])
    weight = keras.ops.convert_to_numpy(metric.weight)
    assert weight[0] == weight[-1] == 1 and weight.sum() == 2


@pytest.mark.parametrize("adaptive", [False, True])
def test_streaming_equals_the_whole(adaptive):
    labels, probs = predictions(300)
    whole = measure(labels, probs, adaptive=adaptive)
    for batch in (100, 7):
        parts = measure(labels, probs, batch=batch, adaptive=adaptive)
        assert parts == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize(("sharpness", "bins"), [(0.3, 15), (3.0, 5), (30.0, 15)])
def test_adaptive_is_within_its_bound_of_a_full_sort(sharpness, bins):
    labels, probs = predictions(3000, sharpness=sharpness)
    metric = ExpectedCalibrationError(num_bins=bins, adaptive=True)
    metric.update_state(labels, probs)
    weight = keras.ops.convert_to_numpy(metric.weight)
    cuts = np.arange(1, bins) * len(labels) / bins
    at_cuts = weight[np.searchsorted(np.cumsum(weight), cuts)]
    bound = 0.51 * at_cuts.sum() / len(labels)
    error = abs(float(metric.result()) - equal_mass(labels, probs, bins))
    assert error <= bound + 1e-5
    if sharpness < 30:
        # Short of ties the cells are fine: a few examples each.
        assert error < 0.01


def test_adaptive_shares_out_ties():
    # All alike: every bin has the overall accuracy, however examples are ordered.
    probs, labels = two_classes(np.full(9, 0.75)), (np.arange(9) < 3).astype(int)
    for order in (slice(None), slice(None, None, -1)):
        value = measure(labels[order], probs, num_bins=4, adaptive=True)
        assert value == pytest.approx(0.75 - 6 / 9, abs=1e-6)


def test_adaptive_finds_what_equal_width_hides():
    # 0.981 wrong and 0.999 right fall in one bin of equal width, in two of mass.
    probs, labels = two_classes([0.981] * 4 + [0.999] * 4), np.repeat([1, 0], 4)
    assert measure(labels, probs, num_bins=2) == pytest.approx(0.49, abs=1e-5)
    value = measure(labels, probs, num_bins=2, adaptive=True)
    assert value == pytest.approx((0.981 + 0.001) / 2, abs=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_integer_weights_are_repetitions(adaptive):
    labels, probs = predictions(300)
    weights = RNG.integers(0, 4, 300)
    repeated = measure(
        np.repeat(labels, weights), np.repeat(probs, weights, 0), adaptive=adaptive
    )
    for w in (weights.astype("float32"), weights[:, None]):
        value = measure(labels, probs, w, adaptive=adaptive)
        assert value == pytest.approx(repeated, abs=1e-6)
    if not adaptive:
        expected = equal_width(labels, probs, 15, weights)
        assert repeated == pytest.approx(expected, abs=1e-6)


def test_logits_one_hot_labels_and_columns_of_labels_give_the_same():
    labels, probs = predictions(300)
    expected = measure(labels, probs)
    logits = np.log(probs) + RNG.normal(size=(300, 1)).astype("float32")
    assert measure(labels, logits, from_logits=True) == pytest.approx(
        expected, abs=1e-6
    )
    assert measure(np.eye(5)[labels], probs) == pytest.approx(expected, abs=1e-6)
    assert measure(labels[:, None], probs) == pytest.approx(expected, abs=1e-6)


def test_members_are_averaged_first():
    labels, a = predictions(300, seed=1)
    _, b = predictions(300, seed=2)
    members = np.stack([a, b], axis=1)
    expected = equal_width(labels, (a + b) / 2, 15)
    assert measure(labels, members) == pytest.approx(expected, abs=1e-5)
    logits = np.log(members)
    value = measure(labels, logits, from_logits=True)
    assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_empty_is_zero_and_reset_empties(adaptive):
    metric = ExpectedCalibrationError(adaptive=adaptive)
    assert float(metric.result()) == 0
    metric.update_state([1], [[0.9, 0.1]])
    assert float(metric.result()) == pytest.approx(0.9)
    metric.reset_state()
    assert float(metric.result()) == 0


def test_in_fit_and_evaluate():
    labels, probs = predictions(64)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Activation("linear")])
    model.compile(
        loss="sparse_categorical_crossentropy",
        metrics=[
            ExpectedCalibrationError(name="ece"),
            ExpectedCalibrationError(adaptive=True, name="adaptive"),
        ],
    )
    logs = model.evaluate(probs, labels, batch_size=10, verbose=0, return_dict=True)
    assert logs["ece"] == pytest.approx(equal_width(labels, probs, 15), abs=1e-5)
    assert logs["adaptive"] == pytest.approx(
        measure(labels, probs, adaptive=True), abs=1e-6
    )


@pytest.mark.parametrize("num_bins", [0, -1, 2.5, "15", True])
def test_refuses_bad_num_bins(num_bins):
    with pytest.raises(ValueError, match="num_bins.*Received"):
        ExpectedCalibrationError(num_bins=num_bins)


def test_refuses_bad_shapes():
    metric = ExpectedCalibrationError()
    with pytest.raises(ValueError, match=r"\[B, M, C\].*Received.*\(2,\)"):
        metric.update_state([0, 1], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"\[B, 2\].*Received.*\(2, 3\)"):
        metric.update_state(np.eye(3)[:2], [[0.5, 0.5], [0.5, 0.5]])


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
def test_contract(adaptive):
    labels, probs = predictions(20)
    check_metric(
        ExpectedCalibrationError,
        {"num_bins": 10, "adaptive": adaptive, "from_logits": True},
        labels,
        np.log(probs),
    )


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("label", [-1, 2, 7])
def test_a_label_that_is_no_class_gives_nan(adaptive, label):
    probs = two_classes([0.7, 0.6, 0.9])
    assert np.isnan(measure(np.array([0, label, 1]), probs, adaptive=adaptive))


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_prediction_of_nan_gives_nan(adaptive):
    probs = two_classes([0.7, np.nan, 0.9])
    assert np.isnan(measure(np.array([0, 0, 1]), probs, adaptive=adaptive))


def test_refuses_another_number_of_labels():
    with pytest.raises(ValueError, match="Received: 1 and 2"):
        ExpectedCalibrationError().update_state([0], two_classes([0.7, 0.6]))


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_empty_batch_counts_nothing(adaptive):
    metric = ExpectedCalibrationError(adaptive=adaptive)
    metric.update_state(np.zeros(0, "int32"), np.zeros((0, 2), "float32"))
    assert float(metric.result()) == 0
