"""Predictions of a classifier and of its members, with their uncertainty."""

import keras
import numpy as np
import pytest

from kzoo.layers import (
    AverageMembers,
    DenseBatchEnsemble,
    DenseFlipout,
    MeanAndVariance,
    PosteriorSamples,
    TileMembers,
)
from kzoo.zoo.predictive import (
    classification,
    ensemble_size,
    regression,
    sampled_regression,
)

X = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(p):
    return -(p * np.log(p)).sum(-1)


def functional(members=3):
    x = keras.Input((3,), name="x")
    y = TileMembers(members)(x)
    y = DenseBatchEnsemble(
        4,
        ensemble_size=members,
        alpha_initializer=keras.initializers.RandomNormal(1, 1, seed=1),
        gamma_initializer=keras.initializers.RandomNormal(1, 1, seed=2),
    )(y)
    return keras.Model(x, AverageMembers(members)(y))


def sequential():
    layers = functional().layers
    return keras.Sequential([keras.Input((3,)), *layers[1:]])


def explicit(model):
    """The members' probabilities, one member at a time, in float64."""
    layer = next(x for x in model.layers if isinstance(x, DenseBatchEnsemble))
    kernel, alpha, gamma, bias = (
        keras.ops.convert_to_numpy(v).astype("float64")
        for v in (layer.kernel, layer.alpha, layer.gamma, layer.bias)
    )
    logits = [(X * alpha[m]) @ kernel * gamma[m] + bias[m] for m in range(len(alpha))]
    return softmax(np.stack(logits, 1))


def outputs(predict, x=X):
    return {k: keras.ops.convert_to_numpy(v) for k, v in predict(x).items()}


def reloaded(tmp_path):
    path = tmp_path / "model.keras"
    functional().save(path)
    return keras.models.load_model(path)


@pytest.mark.parametrize("kind", ["functional", "sequential", "reloaded", "cloned"])
def test_members_and_uncertainty_of_an_ensemble(kind, tmp_path):
    model = {
        "functional": functional,
        "sequential": sequential,
        "reloaded": lambda: reloaded(tmp_path),
        "cloned": lambda: keras.models.clone_model(functional()),
    }[kind]()
    members, predict = classification(model)
    assert members == ensemble_size(model) == 3
    found, probs = outputs(predict), explicit(model)
    mean = probs.mean(1)
    np.testing.assert_allclose(found["member_probabilities"], probs, rtol=1e-5)
    np.testing.assert_allclose(found["probabilities"], mean, rtol=1e-5)
    np.testing.assert_allclose(found["predictive_entropy"], entropy(mean), rtol=1e-5)
    information = entropy(mean) - entropy(probs).mean(1)
    assert information.min() > 1e-4
    np.testing.assert_allclose(found["mutual_information"], information, atol=1e-6)
    # The model's own logits say the same.
    logits = keras.ops.convert_to_numpy(model(X))
    np.testing.assert_allclose(softmax(logits), mean, rtol=1e-5)


def test_a_plain_model_is_one_member():
    x = keras.Input((3,), name="x")
    model = keras.Model(x, keras.layers.Dense(4)(keras.layers.Dropout(0.5)(x)))
    members, predict = classification(model)
    assert members == ensemble_size(model) == 1
    found, probs = outputs(predict), softmax(keras.ops.convert_to_numpy(model(X)))
    assert found["member_probabilities"].shape == (5, 1, 4)
    np.testing.assert_allclose(found["member_probabilities"][:, 0], probs, rtol=1e-5)
    np.testing.assert_allclose(found["probabilities"], probs, rtol=1e-5)
    np.testing.assert_allclose(found["predictive_entropy"], entropy(probs), rtol=1e-5)
    np.testing.assert_allclose(found["mutual_information"], 0, atol=1e-6)


def test_a_subclassed_model_is_one_member():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(4)

        def call(self, x, training=False):
            return self.dense(x)

    members, predict = classification(Model())
    assert members == 1 and outputs(predict)["probabilities"].shape == (5, 4)


def test_follows_the_weights():
    model = functional()
    _, predict = classification(model)
    before = outputs(predict)["probabilities"]
    for v in model.weights:
        v.assign(v * 0)
    np.testing.assert_allclose(outputs(predict)["probabilities"], 0.25)
    assert np.abs(before - 0.25).max() > 0.01


def test_a_single_row():
    _, predict = classification(functional())
    whole, row = outputs(predict), outputs(predict, X[2:3])
    for key in whole:
        np.testing.assert_allclose(row[key], whole[key][2:3], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("how", ["argument", "layer", "nested", "operation"])
def test_probabilities_as_output_are_refused(activation, how):
    x = keras.Input((3,))
    if how == "argument":
        output = keras.layers.Dense(4, activation=activation)(x)
    elif how == "operation":
        output = getattr(keras.ops, activation)(keras.layers.Dense(4)(x))
    else:
        output = keras.layers.Activation(activation)(keras.layers.Dense(4)(x))
    model = keras.Model(x, output)
    if how == "nested":
        model = keras.Sequential([keras.Input((3,)), model])
    with pytest.raises(ValueError, match=f"logits.*Received.*{activation}"):
        classification(model)


def test_a_softmax_layer_as_output_is_refused():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4), keras.layers.Softmax()]
    )
    with pytest.raises(ValueError, match="logits.*Received.*softmax"):
        classification(model)


def test_averaging_elsewhere_is_refused():
    inner = functional()
    x = keras.Input((3,), name="x")
    for output in (inner(x), keras.layers.Dense(2)(inner(x))):
        with pytest.raises(ValueError, match="AverageMembers.*Received: model 'outer'"):
            classification(keras.Model(x, output, name="outer"))


def regressor(dense):
    layers = [dense(4, activation="tanh"), dense(4), MeanAndVariance(5.0, 2.0)]
    return keras.Sequential([keras.Input((3,)), *layers])


def test_means_and_variances_of_a_regressor():
    model = regressor(keras.layers.Dense)
    found = outputs(regression(model))
    y = model.predict(X, verbose=0)
    np.testing.assert_allclose(found["mean"], y[..., 0], rtol=1e-5)
    for name in ("variance", "aleatoric_variance"):
        np.testing.assert_allclose(found[name], y[..., 1], rtol=1e-5)
    np.testing.assert_array_equal(found["epistemic_variance"], 0)
    np.testing.assert_allclose(found["member_means"], y[:, None, :, 0], rtol=1e-5)
    np.testing.assert_allclose(found["member_variances"], y[:, None, :, 1], rtol=1e-5)


def test_the_variance_of_draws_has_two_parts():
    model = regressor(DenseFlipout)
    predict = sampled_regression(model)
    found = outputs(lambda x: predict(x, 64, seed=7))
    y = PosteriorSamples(model, 64, seed=7).predict(X, verbose=0)  # [5, 64, 2, 2]
    y = y.astype("float64")
    means, variances = y[..., 0], y[..., 1]
    aleatoric, epistemic = variances.mean(1), means.var(1)
    assert epistemic.min() > 1e-5
    for name, expected in {
        "mean": means.mean(1),
        "variance": aleatoric + epistemic,
        "aleatoric_variance": aleatoric,
        "epistemic_variance": epistemic,
        "member_means": means,
        "member_variances": variances,
    }.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, err_msg=name)
    # The variance is that of the mixture: of normal draws around each member's mean.
    rng = np.random.default_rng(0)
    draws = rng.normal(means[0, :, 0], np.sqrt(variances[0, :, 0]), (20000, 64))
    assert found["variance"][0, 0] == pytest.approx(draws.var(), rel=0.02)


def test_regressors_and_classifiers_are_told_apart():
    model = regressor(keras.layers.Dense)
    with pytest.raises(ValueError, match="logits, not in means.*Received"):
        classification(model)
    for function in (regression, sampled_regression):
        with pytest.raises(ValueError, match="MeanAndVariance.*Received.*AverageMem"):
            function(functional())
