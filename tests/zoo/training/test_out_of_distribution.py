"""The callback's figures against counts over all pairs, epoch by epoch."""

import keras
import numpy as np
import pytest

from kzoo.layers import AverageMembers, DenseBatchEnsemble, TileMembers
from kzoo.zoo import OutOfDistribution
from kzoo.zoo.predictive import classification

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype("float32")
Y = (X[:, 0] > 0).astype(int)
OUT = (0.5 * RNG.normal(size=(30, 3))).astype("float32")


def ensemble():
    x = keras.Input((3,))
    y = DenseBatchEnsemble(
        2,
        ensemble_size=2,
        alpha_initializer=keras.initializers.RandomNormal(1, 1, seed=1),
        gamma_initializer=keras.initializers.RandomNormal(1, 1, seed=2),
    )(TileMembers(2)(x))
    model = keras.Model(x, AverageMembers(2)(y))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss)
    return model


def by_pairs(inside, outside):
    """AUROC and FPR95 by comparing every two."""
    later = outside[:, None] > inside
    ties = outside[:, None] == inside
    thresholds = np.sort(outside)[::-1]
    needed = thresholds[int(np.ceil(0.95 * len(outside))) - 1]
    return (later + ties / 2).mean(), (inside >= needed).mean()


def probabilities(answer):
    return keras.ops.convert_to_numpy(answer["probabilities"])


SCORES = {
    "entropy": lambda a: keras.ops.convert_to_numpy(a["predictive_entropy"]),
    "mutual_information": lambda a: keras.ops.convert_to_numpy(a["mutual_information"]),
    "max_probability": lambda a: -probabilities(a).max(-1),
}


@pytest.mark.slow
@pytest.mark.parametrize("score", [*SCORES, "function"])
def test_logs_what_all_pairs_say(score):
    function = SCORES.get(score, lambda a: -probabilities(a)[:, 0])
    watch = OutOfDistribution(
        X, OUT, function if score == "function" else score, batch_size=16, name="far"
    )
    model, expected = ensemble(), []

    class Recompute(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            answers = [classification(self.model)[1](x) for x in (X, OUT)]
            expected.append(by_pairs(*map(function, answers)))

    history = model.fit(
        X, Y, batch_size=20, epochs=3, callbacks=[watch, Recompute()], verbose=0
    ).history
    assert history["far_auroc"] == pytest.approx([a for a, _ in expected], abs=2e-3)
    assert history["far_fpr95"] == pytest.approx([f for _, f in expected], abs=0.03)
    assert len(set(history["far_auroc"])) > 1  # It follows the weights.


def test_a_training_that_diverges_is_logged_and_left_to_others():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, jit_compile=False)
    broken = np.where(np.arange(40)[:, None] == 0, np.nan, X)
    callbacks = [OutOfDistribution(X, OUT), keras.callbacks.TerminateOnNaN()]
    history = model.fit(broken, Y, epochs=3, callbacks=callbacks, verbose=0).history
    assert [len(values) for values in history.values()] == [1, 1, 1]
    assert np.isnan([history["ood_auroc"], history["ood_fpr95"]]).all()
    # One score that is not finite is enough.
    scores = iter([np.ones(40), np.where(np.arange(30) == 3, np.inf, 2.0)])
    watch, logs = OutOfDistribution(X, OUT, lambda answer: next(scores)), {}
    watch.set_model(keras.Sequential(model.layers))
    watch.on_train_begin()
    watch.on_epoch_end(0, logs)
    assert np.isnan([logs["ood_auroc"], logs["ood_fpr95"]]).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`score`.*Received: score='raw'"):
        OutOfDistribution(X, OUT, "raw")
    for name, inputs in (("inputs_in", (X[:0], OUT)), ("inputs_out", (X, OUT[:0]))):
        with pytest.raises(ValueError, match=f"`{name}`.*Received: none"):
            OutOfDistribution(*inputs)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="logits, not in probabilities"):
        model.fit(X, Y, callbacks=[OutOfDistribution(X, OUT)], verbose=0)
