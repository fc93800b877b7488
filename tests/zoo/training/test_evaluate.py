"""Evaluation against explicit formulas over the whole split."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from kzoo.layers import (
    AverageMembers,
    DenseBatchEnsemble,
    MonteCarloDropout,
    PosteriorSamples,
    TileMembers,
)
from kzoo.zoo import diversity_report, evaluate, export, fit_temperature, load
from kzoo.zoo.metrics import AreaUnderRiskCoverage, ExpectedCalibrationError
from kzoo.zoo.models.attention_seq2seq import attention_seq2seq, translator
from kzoo.zoo.models.language_model import language_model
from kzoo.zoo.serving.servable import Servable


@pytest.fixture(scope="module")
def validation(data_dir):
    dataset, _ = load("digits", "validation", data_dir=data_dir)
    images, labels = zip(*dataset.as_numpy_iterator(), strict=True)
    return np.stack(images), np.array(labels)


def ensemble(members=3):
    image = keras.Input((8, 8, 1), name="image")
    x = TileMembers(members)(keras.layers.Flatten()(image))
    normal = keras.initializers.RandomNormal(1, 0.5)
    x = DenseBatchEnsemble(
        10, ensemble_size=members, alpha_initializer=normal, gamma_initializer=normal
    )(x)
    return keras.Model(image, AverageMembers(members)(x))


def member_probabilities(model, images):
    layer = model.layers[-2]
    kernel, alpha, gamma = (
        keras.ops.convert_to_numpy(v).astype("float64")
        for v in (layer.kernel, layer.alpha, layer.gamma)
    )
    x = images.reshape(len(images), -1)
    logits = np.stack(
        [(x * alpha[m]) @ kernel * gamma[m] for m in range(len(alpha))], axis=1
    )
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(p):
    return -np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0).sum(-1)


def test_equals_explicit_formulas(validation, data_dir):
    model = ensemble()
    model.layers[-2].shared.kernel.assign(0.2 * model.layers[-2].shared.kernel)
    images, labels = validation
    members = member_probabilities(model, images)
    probs = members.mean(1)
    figures = evaluate(model, split="validation", data_dir=data_dir)
    total = entropy(probs)
    expected = {
        "accuracy": (probs.argmax(-1) == labels).mean(),
        "nll": -np.log(probs[np.arange(len(labels)), labels]).mean(),
        "brier": ((probs - np.eye(10)[labels]) ** 2).sum(-1).mean(),
        "predictive_entropy": total.mean(),
        "mutual_information": (total - entropy(members).mean(1)).mean(),
        "members": 3,
        "parameters": 64 * 10 + 3 * (64 + 10 + 10),
        "examples": 180,
    }
    ece = ExpectedCalibrationError()
    ece.update_state(labels, probs)
    expected["ece"] = float(ece.result())
    aurc = AreaUnderRiskCoverage()
    aurc.update_state(labels, probs)
    expected["aurc"] = float(aurc.result())
    assert figures == pytest.approx(expected, rel=1e-4)
    assert set(figures) == set(expected)
    assert figures["mutual_information"] > 0.01


def test_the_batch_size_does_not_matter(data_dir):
    model = ensemble()
    whole, parts = (
        evaluate(model, split="validation", batch_size=n, data_dir=data_dir)
        for n in (180, 50)
    )
    assert parts == pytest.approx(whole, rel=1e-5)


def test_bins_and_split_are_the_callers(data_dir):
    model = ensemble()
    one = evaluate(model, split="train[:100]", num_bins=1, data_dir=data_dir)
    many = evaluate(model, split="train[:100]", num_bins=50, data_dir=data_dir)
    assert one["examples"] == many["examples"] == 100
    assert one["ece"] < many["ece"]
    for name in ("batch_size", "num_bins"):
        with pytest.raises(ValueError, match=f"Received: {name}=0"):
            evaluate(model, split="validation", data_dir=data_dir, **{name: 0})
    with pytest.raises(ValueError, match="dev"):
        evaluate(model, split="dev", data_dir=data_dir)


def test_evaluate_measures_what_is_calibrated(data_dir):
    model = ensemble()
    examples, _ = load("digits", "validation", data_dir=data_dir)
    calibrated = fit_temperature(model, examples.batch(90))
    before, after = (
        evaluate(m, split="validation", data_dir=data_dir) for m in (model, calibrated)
    )
    assert after["accuracy"] == before["accuracy"]
    for name in ("nll", "brier", "ece"):
        assert after[name] < before[name]
    assert after["nll"] < np.log(10) + 1e-3  # No worse than knowing nothing.
    assert after["predictive_entropy"] > before["predictive_entropy"]


def test_draws_take_the_place_of_members(validation, data_dir, tmp_path):
    image = keras.Input((8, 8, 1), name="image")
    x = keras.layers.Rescaling(1 / 16)(image)
    x = MonteCarloDropout(0.5)(keras.layers.Flatten()(x))
    model = keras.Model(image, keras.layers.Dense(10)(x), name="dropped")
    images, labels = validation
    probs = PosteriorSamples(model, 8, seed=0).predict(images, verbose=0)
    probs = np.exp(probs.astype("float64"))
    probs /= probs.sum(-1, keepdims=True)
    mean = probs.mean(1)
    options = {"split": "validation", "samples": 8, "data_dir": data_dir}
    figures = evaluate(model, batch_size=50, **options)
    nll = -np.log(mean[np.arange(len(labels)), labels]).mean()
    assert figures["nll"] == pytest.approx(nll, rel=1e-4)
    assert figures["members"] == 8
    information = (entropy(mean) - entropy(probs).mean(1)).mean()
    assert figures["mutual_information"] == pytest.approx(information, rel=1e-3)
    report = diversity_report(model, **options)
    assert report.members == 8 and report.ensemble_nll == pytest.approx(nll, rel=1e-4)
    if keras.backend.backend() == "tensorflow":
        servable = Servable(export(model, tmp_path, xla=False))
        saved = evaluate(servable, **options)
        servable.close()
        del figures["parameters"]
        assert saved == pytest.approx(figures, rel=1e-3)
    with pytest.raises(ValueError, match="`samples`.*Received: samples=8 and model"):
        evaluate(plain(), **options)


def test_leaves_a_compiled_model_as_it_is(data_dir):
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)]
    )
    model.compile(loss="mse")
    before = model.get_weights()
    evaluate(model, split="validation", data_dir=data_dir)
    assert model.loss == "mse"
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def plain(classes=10):
    image = keras.Input((8, 8, 1), name="image")
    x = keras.layers.Flatten()(image)
    return keras.Model(image, keras.layers.Dense(classes)(x), name="plain")


class Subclassed(keras.Model):
    """A model whose last operation nobody can see from outside."""

    def __init__(self, function):
        super().__init__(name="hidden")
        self.inner, self.function = plain(), function

    def call(self, x, training=False):
        return self.function(self.inner(x, training=training))


@pytest.mark.parametrize("classes", [9, 11])
def test_another_number_of_classes_is_refused(classes, data_dir):
    with pytest.raises(ValueError, match=rf"digits/1.0.0, 10. Received: .*{classes}\)"):
        evaluate(plain(classes), split="validation", data_dir=data_dir)


def test_probabilities_that_show_only_in_numbers_are_refused(data_dir):
    model = Subclassed(keras.ops.softmax)
    with pytest.raises(ValueError, match="logits.*Received: model 'hidden'"):
        evaluate(model, split="validation", data_dir=data_dir)
    # Logits there are as good as elsewhere, also log-probabilities.
    hidden = Subclassed(keras.ops.log_softmax)
    figures, expected = (
        evaluate(m, split="validation", data_dir=data_dir)
        for m in (hidden, hidden.inner)
    )
    assert figures == pytest.approx(expected, rel=1e-4)


def test_a_model_of_nan_measures_nan(data_dir):
    model = plain()
    model.layers[-1].kernel.assign(np.full((64, 10), np.nan))
    assert np.isnan(evaluate(model, split="validation", data_dir=data_dir)["nll"])


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "outputs, message",
    [
        (lambda logits: {"probabilities": logits}, "without member_probabilities"),
        (
            lambda logits: two(logits),
            "sum to 1. Received: .*least value -",
        ),
        (lambda logits: two(keras.ops.sigmoid(logits)), "sum to 1. Received: .*sums"),
        (lambda logits: two(keras.ops.softmax(logits[:, 1:])), r"Received: .*, 9\)"),
        (lambda logits: two(keras.ops.softmax(logits)), None),
    ],
)
def test_a_savedmodels_probabilities_must_be_some(outputs, message, data_dir, tmp_path):
    model = plain()
    path = export(model, tmp_path, xla=False, function=lambda x: outputs(model(x)))
    servable = Servable(path)
    if message:
        with pytest.raises(ValueError, match=message):
            evaluate(servable, split="validation", data_dir=data_dir)
    else:
        figures = evaluate(servable, split="validation", data_dir=data_dir)
        expected = evaluate(model, split="validation", data_dir=data_dir)
        del expected["parameters"]
        assert figures == pytest.approx(expected, rel=1e-4)
    servable.close()


def two(probs):
    return {"probabilities": probs, "member_probabilities": probs[:, None]}


def test_translations_are_right_or_not(monkeypatch):
    model, rows, length = attention_seq2seq(7, units=4), 30, 5
    source = np.random.default_rng(0).integers(1, 7, (rows, 4)).astype("int32")
    label = keras.ops.convert_to_numpy(
        translator(model, length=length)(source)["ids"]
    ).copy()
    label[::3, 0] = np.where(label[::3, 0] == 3, 4, 3)  # Of every third, another.
    target = np.where(label == 0, 0, np.pad(label, [(0, 0), (1, 0)])[:, :-1])
    target[:, 0] = 1
    data = tf.data.Dataset.from_tensor_slices(
        ({"source": source, "target": target}, label)
    )
    module = sys.modules["kzoo.zoo.training.evaluate"]
    monkeypatch.setattr(module, "load", lambda *args, **kwargs: (data, None))
    figures = evaluate(model, "names", batch_size=8)
    assert figures["exact_match"] == pytest.approx(2 / 3)
    logits = model({"source": source, "target": target})
    log_p = keras.ops.convert_to_numpy(keras.ops.log_softmax(logits))
    right = np.take_along_axis(log_p, label[..., None], -1)[..., 0]
    assert figures["nll"] == pytest.approx(-right[label != 0].mean(), rel=1e-4)
    best = log_p.argmax(-1) == label
    assert figures["accuracy"] == pytest.approx(best[label != 0].mean())
    assert figures["parameters"] == model.count_params()
    assert figures["examples"] == rows
    with pytest.raises(ValueError, match="translations. Received: samples=2"):
        evaluate(model, "names", samples=2)


def test_language_models_are_not_measured_by_examples(data_dir):
    model = language_model(10, embedding=4, units=4, layers=1)
    for measure in (evaluate, diversity_report):
        with pytest.raises(ValueError, match="text_streams.*model='language_model'"):
            measure(model, split="validation", data_dir=data_dir)
