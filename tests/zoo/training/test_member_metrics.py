"""The callback's figures against each member's own model, epoch by epoch."""

import keras
import numpy as np
import pytest

from kzoo.layers import from_batch_ensemble, to_batch_ensemble
from kzoo.zoo import MemberMetrics

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 3)).astype("float32")
Y = np.digitize(X[:, 0], [-0.5, 0.5])


def plain():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, name="logits")])


def ensemble(members=2):
    signs = keras.initializers.RandomNormal(1.0, 1.0, seed=1)
    model = to_batch_ensemble(plain(), members, alpha_initializer=signs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss)
    return model


def log_softmax(logits):
    logits = logits.astype("float64")
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_logs_what_each_members_own_model_says():
    model, expected = ensemble(), []

    class Recompute(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            members = [
                log_softmax(from_batch_ensemble(model, m).predict(X, verbose=0))
                for m in range(2)
            ]
            found = {}
            for m, log_p in enumerate(members):
                one_hot = np.eye(3)[Y]
                found[f"m{m}_nll"] = -log_p[np.arange(len(Y)), Y].mean()
                found[f"m{m}_accuracy"] = (log_p.argmax(-1) == Y).mean()
                found[f"m{m}_brier"] = np.square(np.exp(log_p) - one_hot).sum(-1).mean()
            p = np.exp(members).mean(0)
            nll = -np.log(p[np.arange(len(Y)), Y]).mean()
            found["m_ambiguity"] = (found["m0_nll"] + found["m1_nll"]) / 2 - nll
            said = np.argmax(members, -1)
            found["m_disagreement"] = (said[0] != said[1]).mean()
            expected.append(found)
            # The logs already have them: callbacks that follow can watch them.
            assert found.keys() <= logs.keys()

    watch = MemberMetrics(X, Y[:, None], batch_size=8, name="m")
    found = model.fit(
        X, Y, batch_size=10, epochs=2, callbacks=[watch, Recompute()], verbose=0
    ).history
    for epoch, figures in enumerate(expected):
        for name, figure in figures.items():
            assert found[name][epoch] == pytest.approx(figure, abs=1e-5), name
    assert expected[0]["m_ambiguity"] > 1e-3 and expected[0]["m_disagreement"] > 0


@pytest.mark.parametrize("labels", [Y[1:], Y[:0], Y.astype("float32"), np.eye(3)[Y]])
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(ValueError, match="for each.*Received: labels of shape"):
        MemberMetrics(X, labels)


def test_a_model_of_one_member_is_refused():
    model = plain()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    with pytest.raises(ValueError, match="at least 2 members. Received: model"):
        model.fit(X, Y, callbacks=[MemberMetrics(X, Y)], verbose=0)
