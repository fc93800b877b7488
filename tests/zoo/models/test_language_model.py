"""Language models: written out, what they drop and carry, their table and gradients."""

from functools import partial

import keras
import numpy as np
import pytest

from harness import check_model
from harness.by_hand import randomize, softmax, value
from kzoo.layers import RevGRU
from kzoo.zoo import build
from kzoo.zoo.models.language_model import ResetStates, language_model, take_weights
from kzoo.zoo.predictive import language_modelling

V, D, H = 11, 4, 6
IDS = np.random.default_rng(0).integers(0, V, (3, 5))
RATES = ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout")
NOTHING = {**dict.fromkeys(RATES, 0.0), "weight_drop": 0.0}


def made(**changes):
    arguments = {"embedding": D, "units": H, "recurrent": keras.layers.SimpleRNN}
    model = language_model(V, **{**arguments, **NOTHING, **changes})
    randomize(model, 0)
    return model


def weights(model, *names):
    return [value(v) for n in names for v in model.get_layer(n).trainable_variables]


def logits(model, ids=IDS, **call):
    return value(model(ids, **call))


@pytest.mark.parametrize("project", [False, True])
def test_equals_the_equations(project):
    model = made(project=project)
    (table,) = weights(model, "embedding")
    x = table[IDS]
    for name, size in (("recurrent0", H), ("recurrent1", H if project else D)):
        w, u, b = weights(model, name)
        assert u.shape == (size, size)
        h, outputs = np.zeros((len(IDS), size)), []
        for t in range(IDS.shape[1]):
            h = np.tanh(x[:, t] @ w + h @ u + b)
            outputs.append(h)
        x = np.stack(outputs, 1)
    if project:
        x = x @ weights(model, "projection")[0]
    expected = x @ table.T
    np.testing.assert_allclose(logits(model), expected, rtol=1e-4, atol=1e-5)
    found = value(language_modelling(model)(IDS)["probabilities"])
    np.testing.assert_allclose(found, softmax(expected), rtol=1e-4, atol=1e-6)


def around(model, name, ids=IDS):
    """What goes into a layer in a training step, and what comes out."""
    layer = model.get_layer(name)
    first = keras.tree.flatten(layer.input)[0]
    outputs = keras.Model(model.inputs, [first, layer.output])(ids, training=True)
    return [value(y) for y in outputs]


@pytest.mark.parametrize("name", ["input", "hidden0", "output"])
def test_dropout_is_locked(name):
    """A row drops the same units at all steps, and rows others."""
    rate = name.rstrip("0") + "_dropout"
    before, after = around(made(units=64, **{rate: 0.25}), f"{name}_dropout")
    factor = after / before
    assert set(np.unique(factor.round(5))) == {0.0, np.float64(4 / 3).round(5)}
    np.testing.assert_allclose(factor, factor[:, :1].repeat(5, 1), rtol=1e-5)
    assert (factor[0, 0] != factor[1, 0]).any()


def test_ids_are_dropped_with_their_whole_vectors():
    model = made(embedding_dropout=0.5)
    ids = np.arange(V)[None].repeat(3, 0)
    before, after = around(model, "id_dropout", ids)
    factor = after / before
    assert set(np.unique(factor.round(5))) == {0.0, 2.0}
    np.testing.assert_allclose(factor, factor[:1, :, :1] * np.ones_like(factor))
    # The table is whole where logits are made.
    assert logits(model, training=True).all()


def test_mixed_precision_does_not_round_the_table():
    """Logits are sums in float32 of what the layers give, with E as it is stored."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = made()
    finally:
        keras.config.set_dtype_policy("float32")
    last = keras.Model(model.input, model.get_layer("output_dropout").output)
    h, y = last(IDS), model(IDS)
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in (h, y, model.output)]
    assert dtypes == ["bfloat16", "float32", "float32"]
    (table,) = weights(model, "embedding")
    np.testing.assert_allclose(value(y), value(h) @ table.T, rtol=1e-5, atol=1e-6)
    # The layers' inputs are rounded once.
    x = keras.Model(model.input, model.get_layer("input_dropout").output)(IDS)
    expected = keras.ops.cast(keras.ops.cast(table[IDS], "bfloat16"), "float32")
    np.testing.assert_array_equal(value(x), value(expected))


def test_inference_drops_nothing():
    model = made(**{**dict.fromkeys(RATES, 0.5), "weight_drop": 0.5})
    np.testing.assert_allclose(logits(model), logits(model), rtol=0)
    assert (logits(model, training=True) != logits(model)).any()
    whole = made()
    take_weights(whole, model)
    np.testing.assert_allclose(logits(model), logits(whole), rtol=1e-5)
    names = [type(layer).__name__ for layer in model.layers]
    assert names.count("WeightDrop") == 2


@pytest.mark.slow
@pytest.mark.parametrize("recurrent", [keras.layers.LSTM, RevGRU])
def test_states_are_carried_through_fit_and_evaluate(recurrent):
    """Two batches of fit or evaluate are one of twice the steps."""
    carried = made(recurrent=recurrent, rows=3, weight_drop=0.5)
    whole = made(recurrent=recurrent)
    take_weights(whole, carried)
    x = np.random.default_rng(1).integers(0, V, (3, 8))
    y = np.random.default_rng(2).integers(0, V, (3, 8))
    batches = [np.concatenate([a[:, :4], a[:, 4:]]) for a in (x, y)]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for model in (carried, whole):
        model.compile(keras.optimizers.SGD(0.0), loss)
    expected = whole.evaluate(x, y, verbose=0)
    options = {"batch_size": 3, "verbose": 0, "callbacks": [ResetStates()]}
    for _ in range(2):
        found = carried.evaluate(*batches, **options)
        assert found == pytest.approx(expected, rel=1e-5)
    expected_y = whole.predict(x, verbose=0)
    for _ in range(2):
        found = carried.predict(batches[0], **options)
        found = np.concatenate([found[:3], found[3:]], axis=1)
        np.testing.assert_allclose(found, expected_y, rtol=1e-4, atol=1e-5)
    # In training too, whatever an evaluation left: nothing else is dropped here.
    carried.get_layer("dropped0").rate = carried.get_layer("dropped1").rate = 0.0
    history = carried.fit(*batches, epochs=2, shuffle=False, **options).history
    np.testing.assert_allclose(history["loss"], expected, rtol=1e-5)
    without = carried.fit(*batches, batch_size=3, shuffle=False, verbose=0).history
    assert abs(without["loss"][0] / expected - 1) > 1e-4


@pytest.mark.slow
def test_reversible_layers_learn_as_their_cells_in_kerass_loop():
    """Gradients through carried states and dropped weights."""

    def looped(units, **kwargs):
        options = ("return_sequences", "return_state", "name")
        of_loop = {n: kwargs.pop(n) for n in options}
        return keras.layers.RNN(RevGRU(units, **kwargs).cell, **of_loop)

    losses = []
    for recurrent in (RevGRU, looped):
        keras.utils.set_random_seed(3)
        model = made(recurrent=recurrent, rows=3, weight_drop=0.5)
        model.compile(
            keras.optimizers.SGD(0.5),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        losses.append([model.train_on_batch(IDS, (IDS * 3 + i) % V) for i in range(4)])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert losses[0][0] != losses[0][1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"embedding": 0},
        {"layers": 1.5},
        {"rows": 0},
        {"weight_drop": 1.0},
        {"input_dropout": -0.5},
    ],
)
def test_refuses(arguments):
    with pytest.raises(ValueError, match="Received: "):
        made(**arguments)


def test_carried_states_are_not_exported():
    with pytest.raises(ValueError, match="any number of rows"):
        language_modelling(made(rows=3))


def test_the_registered_model_has_a_million_parameters():
    model = build("rev_gru_python_source")
    assert 1.0e6 < model.count_params() < 1.1e6
    layer = model.get_layer("dropped0").layer
    assert isinstance(layer, RevGRU) and layer.max_forget_bits == 3


@pytest.mark.slow
def test_contract():
    small = {"vocabulary": 7, "embedding": 4, "units": 6}
    recurrent = partial(RevGRU, max_forget_bits=3)
    check_model("rev_gru_python_source", **small, recurrent=recurrent)
