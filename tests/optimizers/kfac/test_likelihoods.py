import keras
import numpy as np
import pytest
from keras import ops

from kzoo.optimizers import (
    KFAC,
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    register_likelihood,
)
from kzoo.optimizers.kfac.terms import Term

N = 40000


@pytest.mark.parametrize("from_logits", [True, False])
def test_labels_are_drawn_from_the_model(from_logits):
    p = np.array([0.1, 0.0, 0.6, 0.3])
    one = np.log(np.maximum(p, 1e-30)) + 3 if from_logits else p
    outputs = ops.convert_to_tensor(np.tile(one, (N, 1)).astype("float32"))
    drawn = ops.convert_to_numpy(Categorical(from_logits).draw(outputs, 0))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / N, p, atol=0.01)
    q = np.array([0.1, 0.9], "float32")
    one = np.log(q / (1 - q)) if from_logits else q
    outputs = ops.convert_to_tensor(np.tile(one, (N, 1)))
    drawn = ops.convert_to_numpy(Bernoulli(from_logits).draw(outputs, 0))
    np.testing.assert_allclose(drawn.mean(0), q, atol=0.01)
    drawn = ops.convert_to_numpy(Gaussian().draw(outputs, 0)) - outputs
    np.testing.assert_allclose(np.mean(drawn), 0, atol=0.02)
    np.testing.assert_allclose(np.var(drawn), 1, atol=0.02)


@pytest.mark.parametrize(
    "loss, labels",
    [
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), [2, 0]),
        ("sparse_categorical_crossentropy", [[2], [0]]),
        ("categorical_crossentropy", [[0, 0, 1], [1, 0, 0]]),
        ("binary_crossentropy", [[1, 0, 1], [0, 0, 1]]),
        ("mse", [[0.3, 2.0, -1.0], [0.0, 1.0, 0.5]]),
        (keras.losses.CategoricalCrossentropy(label_smoothing=0.3), np.eye(3)[[2, 0]]),
        (keras.losses.BinaryCrossentropy(label_smoothing=0.3), [[1, 0, 1], [0, 0, 1]]),
    ],
)
def test_a_term_is_the_loss_but_for_its_share(loss, labels):
    # One output with one example is √c ℓ, and the loss is c ℓ.
    outputs = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]], "float32")
    for output, label in zip(outputs[:, None], labels, strict=True):
        label = ops.convert_to_tensor([label])
        output = ops.convert_to_tensor(output)
        term = Term(loss)
        c = term.likelihood.share(3)
        f = term.f("empirical", output, label, None, 0)
        found = keras.losses.get(loss)
        expected = ops.mean(found(label, output))
        np.testing.assert_allclose(np.abs(f) * c**0.5, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        "mae",
        keras.losses.CategoricalFocalCrossentropy(),
        lambda y, p: p,
        keras.losses.CategoricalCrossentropy(axis=1),
        keras.losses.SparseCategoricalCrossentropy(ignore_class=0),
        keras.losses.MeanSquaredError(reduction=None),
    ],
)
def test_other_losses_are_refused(loss):
    with pytest.raises(ValueError, match="Received: (loss|axis|ignore_c|reduction)"):
        Term(loss)


def test_a_loss_of_ones_own_has_the_likelihood_that_is_registered():
    # An exponential distribution with the rate e^s: ℓ = e^s y - s, whose Fisher
    # information by s is E[(e^s y - 1)²] = 1. The loss is twice ℓ, summed over D.
    def loss(y, s):
        return 2 * ops.sum(ops.exp(s) * y - s, axis=-1)

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(KFAC(model), loss)
    x, y = np.random.default_rng(0).uniform(size=(2, 5, 3)).astype("float32")
    with pytest.raises(ValueError, match="register_likelihood.*Received: loss=<func"):
        model.train_on_batch(x, y[:, :2])

    @register_likelihood(loss)
    class Exponential(Likelihood):
        def loss(self, labels, outputs):
            return ops.sum(ops.exp(outputs) * labels - outputs, axis=-1)

        def roots(self, outputs):
            return outputs

        def share(self, size):
            return 2.0

    model.compile(KFAC(model, fisher="exact", seed=0), loss)
    model.train_on_batch(x, y[:, :2])
    (found,) = model.optimizer.factors.values()
    np.testing.assert_allclose(found["G"], 2 * np.eye(2), rtol=1e-5, atol=1e-6)
    assert Term(loss).likelihood.from_logits is False

    class Derived(keras.losses.MeanSquaredError):
        pass

    with pytest.raises(ValueError, match="likelihood is known"):
        Term(Derived())
    with pytest.raises(ValueError, match=r"expected classes.*Received: \['mse'\]"):
        register_likelihood("mse")
