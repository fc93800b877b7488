import keras
import numpy as np
import pytest
from keras import ops

from kzoo.optimizers.kfac.fisher import Bernoulli, Categorical, Gaussian, Term

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
    ],
)
def test_other_losses_are_refused(loss):
    with pytest.raises(ValueError, match="Received: (loss|axis)="):
        Term(loss)
