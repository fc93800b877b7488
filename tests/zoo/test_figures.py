import numpy as np
import pytest
from matplotlib.image import imread

from kzoo.zoo import figures
from kzoo.zoo.metrics import AreaUnderRiskCoverage, ExpectedCalibrationError


def answers(n=60, classes=4, members=3, seed=0):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(0.5 * np.ones(classes), (n, members)).astype("float32")
    mean = probs.mean(axis=1)
    return rng.integers(classes, size=n), {
        "probabilities": mean,
        "member_probabilities": probs,
        "predictive_entropy": -np.sum(mean * np.log(mean + 1e-30), axis=1),
    }


def test_bins_by_hand():
    probs = [[0.9, 0.1], [0.7, 0.3], [0.5, 0.5], [0.2, 0.8], [0.25, 0.75]]
    count, confidence, accuracy = figures.reliability([0, 1, 0, 1, 1], probs, bins=4)
    # 0.5 lies in the bin that ends there, 0.75 in the one below 1.
    np.testing.assert_array_equal(count, [0, 1, 2, 2])
    np.testing.assert_allclose(confidence, [np.nan, 0.5, 0.725, 0.85])
    np.testing.assert_allclose(accuracy, [np.nan, 1, 0.5, 1])


@pytest.mark.parametrize("seed", range(3))
def test_bins_are_those_of_the_metric(seed):
    labels, answer = answers(seed=seed)
    count, confidence, accuracy = figures.reliability(labels, answer["probabilities"])
    full = count > 0
    ece = np.sum(count[full] * abs(accuracy - confidence)[full]) / len(labels)
    metric = ExpectedCalibrationError()
    metric.update_state(labels, answer["probabilities"])
    np.testing.assert_allclose(ece, float(metric.result()), rtol=1e-5)


def test_labels_that_do_not_fit():
    with pytest.raises(ValueError, match=r"Expected labels.*\(3,\) and \(4, 2\)"):
        figures.reliability([0, 1, 1], np.full((4, 2), 0.5))


def test_wilsons_interval():
    # 8 of 10: (0.4901..., 0.9433...) by Wilson's formula; never outside [0, 1].
    low, high = figures._wilson(np.array([0.8, 1.0, 0.0]), np.array([10, 5, 5]))
    np.testing.assert_allclose(low[0], 0.490162, atol=1e-4)
    np.testing.assert_allclose(high[0], 0.943318, atol=1e-4)
    np.testing.assert_allclose([high[1], low[2]], [1, 0], atol=1e-12)


@pytest.mark.slow
def test_the_figure_is_written_whole_and_again_the_same(tmp_path):
    labels, ensemble = answers()
    single = {**ensemble, "member_probabilities": ensemble["probabilities"][:, None]}
    images = np.random.default_rng(0).uniform(0, 16, (60, 8, 8, 1))
    path = tmp_path / "deep" / "figure.png"
    drawn = figures.draw(path, images, labels, {"one": single, "four": ensemble})
    assert drawn == path
    picture = imread(path)
    assert picture.shape == (1248, 1495, 4)
    assert picture[..., :3].std() > 0.1
    before = path.read_bytes()
    figures.draw(path, images, labels, {"one": single, "four": ensemble})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]


def test_a_figure_of_fewer_examples_than_places(tmp_path):
    labels, single = answers(n=3, members=1)
    images = np.zeros((3, 5, 5, 1))
    assert figures.draw(tmp_path / "a.png", images, labels, {"one": single}).exists()


@pytest.mark.parametrize("seed", range(2))
def test_the_area_below_the_curve_is_the_metrics(seed):
    labels, answer = answers(seed=seed)
    coverage, risk = figures.risk_coverage(labels, answer["probabilities"])
    wrong = answer["probabilities"].argmax(-1) != labels
    assert coverage[-1] == 1 and risk[-1] == pytest.approx(wrong.mean())
    c = (np.arange(60_000) + 0.5) / 60_000
    errors = np.interp(c, np.append(0, coverage), np.append(0, coverage * risk))
    metric = AreaUnderRiskCoverage()
    metric.update_state(labels, answer["probabilities"])
    assert np.mean(errors / c) == pytest.approx(float(metric.result()), abs=5e-3)


def test_the_curves_are_drawn(tmp_path):
    labels, answer = answers()
    path = tmp_path / "new" / "curves.png"
    answer = {"one": answer, "other": answers(seed=1)[1]}
    assert figures.draw_risk_coverage(path, labels, answer) == path
    assert imread(path)[..., :3].std() > 0.05
