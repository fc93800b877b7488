"""Temperatures: where the optimum is known, that it is one, and models with it."""

import keras
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax

from harness.fresh import record_answer
from harness.session import get
from kzoo.layers import (
    AverageMembers,
    DenseBatchEnsemble,
    DenseFlipout,
    MeanFieldNormal,
    PosteriorMean,
    PosteriorSamples,
    TemperatureScaling,
    TileMembers,
)
from kzoo.zoo import export, fit_temperature
from kzoo.zoo.calibration import optimal_temperature
from kzoo.zoo.predictive import (
    classification,
    ensemble_size,
    sampled_classification,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).astype("float32")


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def answers(predict, *arguments, **options):
    found = predict(*arguments, **options)
    return {name: numpy(value) for name, value in found.items()}


def labels_of(model):
    """Labels of which about half are the model's most probable class."""
    logits = PosteriorMean(model) if model.name == "bayesian" else model
    said = logits.predict(X, verbose=0).argmax(-1)
    others = np.random.default_rng(1).integers(0, 3, 60)
    return np.where(np.arange(60) % 3, said, others)


def nll(logits, labels):
    return -log_softmax(logits, -1)[np.arange(len(labels)), labels].mean()


def entropy(p):
    return -(p * np.log(p)).sum(-1)


def normal(seed):
    return keras.initializers.RandomNormal(0.0, 2.0, seed=seed)


def plain():
    x = keras.Input((4,), name="x")
    logits = keras.layers.Dense(3, kernel_initializer=normal(0))(x)
    return keras.Model(x, logits, name="plain")


def ensemble(members=3):
    x = keras.Input((4,), name="x")
    y = DenseBatchEnsemble(
        3,
        ensemble_size=members,
        kernel_initializer=normal(1),
        alpha_initializer=normal(2),
        gamma_initializer=normal(3),
    )(TileMembers(members)(x))
    return keras.Model(x, AverageMembers(members)(y), name="ensemble")


def bayesian():
    wide = MeanFieldNormal(
        loc_initializer=normal(1), untransformed_scale_initializer="ones"
    )
    layer = DenseFlipout(3, kernel_posterior_fn=wide)
    return keras.Sequential([keras.Input((4,), name="x"), layer], name="bayesian")


@pytest.mark.parametrize("c", [0.2, 1.0, 7.0])
def test_undoes_what_a_calibrated_classifier_was_multiplied_by(c):
    # Labels that are the probabilities themselves: as many draws as one likes.
    z = 2 * RNG.normal(size=(50, 5))
    assert optimal_temperature(c * z, softmax(z, -1)) == pytest.approx(c, rel=1e-6)


def test_is_where_logits_are_as_expected_and_nowhere_better():
    z, y = 4 * RNG.normal(size=(300, 5)), RNG.integers(0, 5, 300)
    y[:150] = z[:150].argmax(-1)
    t = optimal_temperature(z, y)
    expected = (softmax(z / t, -1) * z).sum(-1).mean()
    assert z[np.arange(300), y].mean() == pytest.approx(expected, abs=1e-9)
    for other in (1.0, 0.999 * t, 1.001 * t, 10.0):
        assert nll(z / t, y) < nll(z / other, y)


def test_members_are_averaged_first():
    z, y = 3 * RNG.normal(size=(200, 4, 5)), RNG.integers(0, 5, 200)
    y[:120] = z[:120].mean(1).argmax(-1)
    pooled = logsumexp(log_softmax(z, -1), axis=1)
    expected = optimal_temperature(pooled, y)
    assert optimal_temperature(z, y) == pytest.approx(expected, rel=1e-9)
    one_hot = np.eye(5)[y]
    assert optimal_temperature(z, one_hot) == pytest.approx(expected, rel=1e-9)
    assert optimal_temperature(z, y[:, None]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("make", [plain, ensemble])
def test_a_model_is_calibrated_as_a_whole(make, tmp_path):
    model = make()
    model.compile("sgd", "mse")
    before = answers(classification(model)[1], X)
    y = labels_of(model)
    calibrated = fit_temperature(model, X, y)
    assert model.optimizer is not None and not calibrated.compiled
    t = float(calibrated.layers[-1].temperature)
    p = before["probabilities"].astype("float64")
    assert t == pytest.approx(optimal_temperature(np.log(p), y), rel=1e-4)
    assert abs(t - 1) > 0.1
    expected = softmax(np.log(p) / t, -1)
    assert nll(np.log(expected), y) < nll(np.log(p), y)

    members, predict = classification(calibrated)
    found = answers(predict, X)
    assert members == ensemble_size(calibrated) == ensemble_size(model)
    np.testing.assert_allclose(found["probabilities"], expected, 1e-4, 1e-6)
    np.testing.assert_array_equal(found["probabilities"].argmax(-1), p.argmax(-1))
    np.testing.assert_allclose(found["predictive_entropy"], entropy(expected), 1e-4)
    for name in ("member_probabilities", "mutual_information"):
        np.testing.assert_allclose(found[name], before[name], 1e-5, 1e-6)
    logits = calibrated.predict(X, verbose=0)
    np.testing.assert_allclose(softmax(logits, -1), expected, 1e-4, 1e-6)

    calibrated.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = answers(classification(loaded)[1], X)
    np.testing.assert_allclose(again["probabilities"], found["probabilities"], 1e-5)


def test_calibrated_again_it_starts_from_the_logits():
    model = plain()
    y = labels_of(model)
    once = fit_temperature(model, X, y)
    twice = fit_temperature(once, X, y)
    t = [float(m.layers[-1].temperature) for m in (once, twice)]
    assert t[1] == pytest.approx(t[0], rel=1e-6)
    assert len(twice.layers) == len(once.layers) == len(model.layers) + 1
    assert twice.layers[1] is model.layers[1]


def test_batches_of_pairs_give_the_same():
    model = plain()
    y = labels_of(model)
    expected = float(fit_temperature(model, X, y).layers[-1].temperature)
    pairs = [(X[i : i + 20], y[i : i + 20]) for i in (0, 20, 40)]
    for found in (
        fit_temperature(model, pairs),
        fit_temperature(model, X, y, batch_size=25),
    ):
        assert float(found.layers[-1].temperature) == pytest.approx(expected, rel=1e-5)


def test_draws_of_a_bayesian_model_have_a_temperature_of_their_own():
    model = bayesian()
    y = labels_of(model)
    at_mean, of_draws = (
        fit_temperature(model, X, y, samples=samples) for samples in (None, 16)
    )
    mean = PosteriorMean(model).predict(X, verbose=0)
    drawn = PosteriorSamples(model, 16, seed=0).predict(X, verbose=0)
    t = [float(m.layers[-1].temperature) for m in (at_mean, of_draws)]
    expected = [optimal_temperature(z, y) for z in (mean, drawn)]
    assert t == pytest.approx(expected, rel=1e-4)
    assert abs(t[0] - t[1]) > 0.1
    found = answers(sampled_classification(of_draws), X, 16, seed=0)
    members = softmax(drawn.astype("float64"), -1)
    pooled = softmax(np.log(members.mean(1)) / t[1], -1)
    np.testing.assert_allclose(found["probabilities"], pooled, 1e-4, 1e-6)
    np.testing.assert_allclose(found["member_probabilities"], members, 1e-4, 1e-6)


@pytest.mark.tensorflow
def test_exported_for_a_process_without_the_package(tmp_path):
    model = ensemble()
    calibrated = fit_temperature(model, X, labels_of(model))
    folder = get().new("exports", "calibrated")
    export(calibrated, tmp_path).rename(folder / "saved_model")
    expected = answers(classification(calibrated)[1], X)
    for signature in ("serving_default", "serving_xla"):
        record_answer(folder, signature, 0, {"x": X}, expected)


def test_labels_without_a_best_temperature_are_refused():
    logits = numpy(plain()(X))
    for labels in (logits.argmax(-1), logits.argmin(-1)):
        with pytest.raises(ValueError, match="one temperature.*Received: 60 labels"):
            fit_temperature(plain(), X, labels)


def test_what_does_not_fit_is_refused():
    y = np.arange(60) % 3
    with pytest.raises(ValueError, match="labels of 3 classes. Received"):
        fit_temperature(plain(), X, y + 1)
    with pytest.raises(ValueError, match="labels of 3 classes. Received"):
        optimal_temperature(numpy(plain()(X)), 0.5 * y)
    with pytest.raises(ValueError, match=r"as many labels.*Received: \[59, 60\]"):
        fit_temperature(plain(), X, y[:59])
    with pytest.raises(ValueError, match="Received: none"):
        fit_temperature(plain(), [])
    pairs = "pairs .x, y.. Received: a batch "
    with pytest.raises(ValueError, match=f"{pairs}.*'ndarray', 'ndarray', 'ndarray'"):
        fit_temperature(plain(), [(X, y, y)])
    with pytest.raises(ValueError, match=f"{pairs}ndarray"):
        fit_temperature(plain(), X)
    with pytest.raises(ValueError, match="Received: samples=4 and model 'plain'"):
        fit_temperature(plain(), X, y, samples=4)
    with pytest.raises(ValueError, match="2 of them not finite"):
        optimal_temperature([[np.nan, 0.0], [1.0, 0.0]], [0, 1])
    for last in (keras.layers.Softmax(), TemperatureScaling()):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Softmax(), last])
        with pytest.raises(ValueError, match="logits, not in probabilities"):
            fit_temperature(model, X, y)

    class Subclassed(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="Sequential or functional.*Subclassed"):
        fit_temperature(Subclassed(), X, y)
