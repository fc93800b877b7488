"""Deep ensembles: each network as if it stood alone, and one model of all of them."""

import keras
import numpy as np
import pytest
from keras import layers

from harness.fresh import record_answer, record_case
from harness.session import get
from kzoo.zoo import diversity_report, evaluate, export, train
from kzoo.zoo.models.deep_ensemble import MemberNetworks, deep_ensemble
from kzoo.zoo.predictive import classification

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 4)).astype("float32")
Y = RNG.integers(0, 3, 24)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(width=6):
    x = keras.Input((4,), name="x")
    h = layers.Dense(width, kernel_regularizer=keras.regularizers.L2(0.1))(x)
    h = layers.ReLU()(layers.BatchNormalization()(h))
    return keras.Model(x, layers.Dense(3)(h))


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_predicts_the_mean_of_its_networks_probabilities():
    networks = [network() for _ in range(3)]
    model = deep_ensemble(networks)
    probs = np.stack([softmax(n.predict(X, verbose=0)) for n in networks], 1)
    members, predict = classification(model)
    assert members == 3
    found = {name: numpy(value) for name, value in predict(X).items()}
    np.testing.assert_allclose(found["member_probabilities"], probs, 1e-5, 1e-6)
    np.testing.assert_allclose(found["probabilities"], probs.mean(1), 1e-5, 1e-6)
    logits = model.predict(X, batch_size=10, verbose=0)
    np.testing.assert_allclose(softmax(logits), probs.mean(1), 1e-5, 1e-6)
    assert found["mutual_information"].min() > 1e-5
    # What is trained is the networks themselves.
    networks[0].layers[1].kernel.assign(0 * networks[0].layers[1].kernel)
    assert np.abs(model.predict(X, verbose=0) - logits).max() > 1e-3


def test_trained_together_each_is_as_if_it_stood_alone():
    networks = [network() for _ in range(3)]
    alone = [keras.models.clone_model(n) for n in networks]
    for n, a in zip(networks, alone, strict=True):
        a.set_weights(n.get_weights())
        a.compile(keras.optimizers.SGD(0.1, momentum=0.9), LOSS)
    model = deep_ensemble(networks)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), LOSS)
    parts = [slice(8 * m, 8 * m + 8) for m in range(3)]
    # In training each row is that of its own network.
    rows = numpy(model(X, training=True))
    for part, a in zip(parts, alone, strict=True):
        expected = softmax(numpy(a(X[part], training=True)))
        np.testing.assert_allclose(np.exp(rows[part]), expected, 1e-5, 1e-6)
    for _ in range(3):
        model.train_on_batch(X, Y)
        for part, a in zip(parts, alone, strict=True):
            a.train_on_batch(X[part], Y[part])
    for n, a in zip(networks, alone, strict=True):
        for mine, its in zip(n.get_weights(), a.get_weights(), strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-6)


def test_from_a_name_or_a_function(tmp_path):
    named = deep_ensemble("resnet8_digits", 2)
    assert named.input_shape == (None, 8, 8, 1) and named.inputs[0].name == "image"
    named.save(tmp_path / "model.keras")  # Its networks have one name.
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one, other in zip(named.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    keras.utils.set_random_seed(1)
    first = deep_ensemble(network, 2).get_weights()
    keras.utils.set_random_seed(1)
    for one, other in zip(first, deep_ensemble(network, 2).get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_networks_of_several_inputs():
    def make():
        inputs = {name: keras.Input((2,), name=name) for name in ("a", "b")}
        y = layers.Dense(3)(layers.Concatenate()(list(inputs.values())))
        return keras.Model(inputs, y)

    networks = [make(), make()]
    model = deep_ensemble(networks)
    x = {"a": X[:, :2], "b": X[:, 2:]}
    expected = np.mean([softmax(n.predict(x, verbose=0)) for n in networks], 0)
    np.testing.assert_allclose(softmax(model.predict(x, verbose=0)), expected, 1e-5)
    model.compile("sgd", LOSS)
    model.fit(x, Y, batch_size=8, verbose=0)


def test_saved_loaded_and_answered_elsewhere(tmp_path):
    model = deep_ensemble(network, 3)
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    model.fit(X, Y, batch_size=12, verbose=0)
    expected = model.predict(X, verbose=0)
    record_case(
        "deep_ensemble",
        model,
        [MemberNetworks],
        outputs=(X, expected),
        steps=lambda: ([(X, Y)], np.array([model.train_on_batch(X, Y)])),
        tol=1e-4,
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.predict(X, verbose=0), model.predict(X, verbose=0), 1e-5, 1e-6
    )
    if keras.backend.backend() == "tensorflow":
        folder = get().new("exports", "deep_ensemble")
        export(model, tmp_path).rename(folder / "saved_model")
        answer = classification(model)[1](X)
        answer = {name: numpy(value) for name, value in answer.items()}
        for signature in ("serving_default", "serving_xla"):
            record_answer(folder, signature, 0, {"x": X}, answer)


@pytest.mark.slow
@pytest.mark.parametrize("members", ["split", "tile"])
def test_in_the_zoo(members, data_dir, tmp_path):
    def small():
        image = keras.Input((8, 8, 1), name="image")
        x = layers.Flatten()(layers.Rescaling(1 / 16)(image))
        return keras.Model(image, layers.Dense(10)(x))

    options = {"epochs": 2, "batch_size": 128, "learning_rate": 0.05}
    result = train(
        deep_ensemble(small, 2),
        members=members,
        run_dir=tmp_path,
        data_dir=data_dir,
        verbose=False,
        **options,
    )
    assert result.history["val_accuracy"][-1] > 0.6
    options = {"split": "validation", "data_dir": data_dir}
    figures = evaluate(result.model, **options)
    assert figures["members"] == 2 and figures["parameters"] == 2 * 650
    report = diversity_report(result.model, **options)
    assert report.ensemble_nll == pytest.approx(figures["nll"], rel=1e-4)
    assert report.ambiguity > 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`members`.*Received: members=None"):
        deep_ensemble(network)
    with pytest.raises(ValueError, match="Received: 1 networks and members=2"):
        deep_ensemble([network()], 2)
    with pytest.raises(ValueError, match="Received: \\[\\]"):
        deep_ensemble([])
    one = network()
    for same in ([one, one], [one, keras.models.clone_model(one)]):
        same[1].set_weights(one.get_weights())
        with pytest.raises(ValueError, match="differ.*twice"):
            deep_ensemble(same)
    with pytest.raises(ValueError, match="of the first. Received"):
        x = keras.Input((5,), name="x")
        deep_ensemble([one, keras.Model(x, layers.Dense(3)(x))])
    with pytest.raises(ValueError, match="of 2 members"):
        deep_ensemble([deep_ensemble(network, 2)])
    with pytest.raises(ValueError, match="logits, not in probabilities"):
        x = keras.Input((4,))
        deep_ensemble([keras.Model(x, layers.Dense(3, "softmax")(x))])
