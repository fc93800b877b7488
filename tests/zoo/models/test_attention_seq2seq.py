"""Encoder-decoders with attention: written out, what they attend to, translations."""

from functools import partial

import keras
import numpy as np
import pytest

from harness import check_model, session
from harness.by_hand import randomize, softmax, value
from harness.fresh import record_answer
from harness.training import forward
from kzoo.layers import RevGRU, RevLSTM, WeightDrop
from kzoo.zoo.export import export
from kzoo.zoo.models.attention_seq2seq import (
    ATTEND_TO,
    attention_seq2seq,
    translator,
)

V, D, START, END = 7, 6, 1, 2
LAYERS = {
    "gru": keras.layers.GRU,
    "lstm": keras.layers.LSTM,
    "rev_gru": partial(RevGRU, max_forget_bits=3),
    "rev_lstm": partial(RevLSTM, max_forget_bits=3),
}


def names(seed=0, rows=4):
    """Ids of sources and targets, some of them padded."""
    rng = np.random.default_rng(seed)
    source, target = rng.integers(1, V, (rows, 5)), rng.integers(1, V, (rows, 4))
    source[0, 3:] = 0
    target[-1, 2:] = 0
    return {"source": source.astype("int32"), "target": target.astype("int32")}


def made(kind="gru", **changes):
    changes = {"units": D, "slice_size": 4, **changes}
    model = attention_seq2seq(V, recurrent=LAYERS[kind], **changes)
    randomize(model)
    return model


def logits(model, **ids):
    return value(model(ids))


def written_out(model, source, target, attend_to):
    """The docstring's formulas around the recurrent layers."""

    def weights(name):
        return [value(w) for w in model.get_layer(name).weights]

    (table,), seen = weights("source_embedding"), source != 0
    x = embeddings = table[source]
    states = []
    for i in range(2):
        layer = model.get_layer(f"encoder{i}")
        x, *last = layer(x.astype("float32"), mask=keras.ops.convert_to_tensor(seen))
        states.append(last)
        x = value(x)
    memory = {
        "states": [x],
        "embeddings": [embeddings],
        "slice": [x[..., :4]],
        "slice and embeddings": [embeddings, x[..., :4]],
    }[attend_to]
    memory = np.concatenate(memory, -1)
    (table,) = weights("target_embedding")
    h = table[target]
    for i in range(2):
        # Padding is last: what comes of it is nothing to the steps before.
        layer = model.get_layer(f"decoder{i}")
        h = value(layer(h.astype("float32"), initial_state=states[i]))
    (w_a,), (w_c,), (w, b) = map(weights, ("query", "attended", "logits"))
    scores = np.einsum("btd,de,bse->bts", h, w_a, memory)
    attention = softmax(np.where(seen[:, None], scores, -np.inf))
    context = np.einsum("bts,bse->bte", attention, memory)
    return np.tanh(np.concatenate([context, h], -1) @ w_c) @ w + b


@pytest.mark.parametrize(
    "kind, attend_to", [*zip(LAYERS, ATTEND_TO, strict=True), ("rev_lstm", "slice")]
)
def test_equals_the_formulas_written_out(kind, attend_to):
    model, ids = made(kind, layers=2, attend_to=attend_to), names()
    expected = written_out(model, **ids, attend_to=attend_to)
    seen = ids["target"] != 0
    found = value(forward(model, ids, False)[0])
    np.testing.assert_allclose(found[seen], expected[seen], rtol=1e-4, atol=1e-5)


def test_reversible_layers_return_the_slice_alone():
    for kind in ("rev_gru", "rev_lstm"):
        model = made(kind, layers=2, attend_to="slice")
        shapes = [model.get_layer(f"encoder{i}").output[0].shape for i in range(2)]
        assert shapes == [(None, None, D), (None, None, 4)]
    for kind in LAYERS:
        # Nor any where vectors are all that is attended to.
        model = made(kind, attend_to="embeddings")
        assert model.get_layer("encoder0").output[0].shape == (None, D)


def test_padding_and_later_positions_change_nothing():
    model, ids = made("rev_gru", attend_to="slice and embeddings"), names()
    source, target = ids["source"], ids["target"]
    before = logits(model, **ids)
    longer = np.pad(source, [(0, 0), (0, 3)])
    found = logits(model, source=longer, target=target)
    np.testing.assert_allclose(found, before, atol=1e-5)
    later = np.where(np.arange(4) < 2, target, target % (V - 1) + 1)
    found = logits(model, source=source, target=later)
    np.testing.assert_allclose(found[:, :2], before[:, :2], atol=1e-5)
    assert np.abs(found[:-1, 2:] - before[:-1, 2:]).max(-1).min() > 1e-3


def test_losses_pass_over_padding():
    model, ids = made(), names()
    labels = np.random.default_rng(1).integers(1, V, ids["target"].shape)
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() == "jax",
    )
    found = np.ravel(model.test_on_batch(ids, labels))[0]
    log_p = np.log(softmax(logits(model, **ids)))
    nll = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    assert found == pytest.approx(nll[ids["target"] != 0].mean(), rel=1e-5)
    assert abs(found - nll.mean()) > 1e-3


def test_dropped_are_the_same_units_at_all_steps():
    model = made("rev_gru", layers=2, attend_to="slice", dropout=0.5)
    layers = [x for x in model.layers if "_dropout" in x.name]
    assert {x.name for x in layers} == {
        f"{x}_dropout"
        for x in ("source", "target", "encoder0", "slice", "decoder0", "decoder1")
    }
    for layer in layers:
        y = value(layer(np.ones((3, 5, 8), "float32"), training=True))
        assert set(y.flat) == {0.0, 2.0}
        np.testing.assert_array_equal(y, np.repeat(y[:, :1], 5, 1))


# --- translations -----------------------------------------------------------------


def log_p_of(model, source, ids):
    """Log-probabilities of translations, by the model that was trained."""
    target = np.pad(ids[:, :-1], [(0, 0), (1, 0)], constant_values=START)
    log_p = np.log(softmax(logits(model, source=source, target=target)))
    log_p = np.take_along_axis(log_p, ids[..., None], -1)[..., 0]
    return np.where(ids != 0, log_p, 0).sum(1)


def greedy(model, source, length):
    """The likeliest id again and again, each time from the start."""
    found = np.zeros((len(source), length), "int32")
    has_ended = np.zeros(len(source), bool)
    for t in range(length):
        target = np.pad(found[:, :-1], [(0, 0), (1, 0)], constant_values=START)
        best = 1 + logits(model, source=source, target=target)[:, t, 1:].argmax(-1)
        found[:, t] = np.where(has_ended, 0, best)
        has_ended |= best == END
    return found


def found_by(model, source):
    found = forward(model, source, False)[0]
    return keras.ops.convert_to_numpy(found["ids"]), value(found["scores"])


@pytest.mark.slow
@pytest.mark.parametrize("kind, attend_to", zip(LAYERS, ATTEND_TO, strict=True))
def test_translates_by_steps_of_the_trained_decoder(kind, attend_to):
    model = made(kind, layers=2, attend_to=attend_to)
    source = names(rows=6)["source"]
    one = translator(model, beams=1, length=5)
    assert {id(w) for w in one.weights} == {id(w) for w in model.weights}
    ids, scores = found_by(one, source)
    np.testing.assert_array_equal(ids, greedy(model, source, 5))
    np.testing.assert_allclose(scores, log_p_of(model, source, ids), rtol=1e-4)
    # Of more beams than one the states change places.
    ids, scores = found_by(translator(model, beams=4, length=5), source)
    np.testing.assert_allclose(scores, log_p_of(model, source, ids), rtol=1e-4)
    # Nothing follows the end, and padding comes nowhere else.
    for row in ids:
        assert END not in row[:-1] or not row[[*row].index(END) + 1 :].any()
        assert row[: [*row, END].index(END)].all()


def test_rows_and_padding_of_sources_change_no_translation():
    model = translator(made("rev_gru", attend_to="slice"), beams=3, length=4)
    source = names()["source"]
    ids, scores = found_by(model, source)
    longer = np.pad(source, [(0, 0), (0, 2)])
    for same_ids, same in (found_by(model, longer), found_by(model, source[:1])):
        np.testing.assert_array_equal(same_ids, ids[: len(same)])
        np.testing.assert_allclose(same, scores[: len(same)], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.tensorflow
def test_serves_translations(tmp_path):
    """By two signatures, from the session's folder in a fresh process."""
    model = translator(made("rev_gru", attend_to="slice"), beams=2, length=4)
    folder, source = session.get().new("exports", model.name), names()["source"]
    path = export(model, tmp_path, example={"source": source})
    path.rename(folder / "saved_model")
    for i, rows in enumerate((source, source[:1, :2])):
        ids, scores = found_by(model, rows)
        answer = {"ids": ids, "scores": scores.astype("float32")}
        for signature in ("serving_default", "serving_xla"):
            record_answer(folder, signature, i, {"source": rows}, answer, 1e-5)


def test_translators_are_saved_and_cloned(tmp_path):
    model = translator(made("rev_lstm", layers=2), length=4, length_penalty=0.5)
    source = names()["source"]
    expected = found_by(model, source)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for found, one in zip(found_by(loaded, source), expected, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-5)


# --- arguments and the contract ---------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"vocabulary": 0},
        {"units": 0},
        {"layers": 0},
        {"attend_to": "nothing"},
        {"attend_to": "slice", "slice_size": D + 1},
        {"dropout": 1.0},
    ],
)
def test_refusals(change):
    with pytest.raises(ValueError, match=f"Received: {[*change][-1]}="):
        attention_seq2seq(**{"vocabulary": V, "units": D, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"beams": 0},
        {"length": 0},
        {"start": 0},
        {"start": V},
        {"end": V},
        {"length_penalty": -1},
    ],
)
def test_refusals_of_translators(change):
    with pytest.raises(ValueError, match=f"Received: {[*change][-1]}="):
        translator(made(), **change)


def test_translators_refuse_decoders_without_a_cell():
    def recurrent(units, **kwargs):
        layer = keras.layers.GRU(units, **kwargs)
        is_last = layer.name == "decoder1"
        return WeightDrop(layer, name=layer.name) if is_last else layer

    model = attention_seq2seq(V, units=D, layers=2, recurrent=recurrent)
    with pytest.raises(ValueError, match="`cell`.*Received: WeightDrop 'decoder1'"):
        translator(model)


@pytest.mark.slow
def test_contract():
    check_model("attention_seq2seq_camel_case", units=4, slice_size=1)


@pytest.mark.parametrize("kind", ["gru", "rev_lstm"])
def test_mixed_precision(kind):
    ids = names()
    expected = softmax(logits(made(kind), **ids))
    model = under("mixed_bfloat16", made, kind)
    found = forward(model, ids, False)[0]
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    assert {str(v.dtype) for v in model.trainable_variables} == {"float32"}
    np.testing.assert_allclose(softmax(value(found)), expected, atol=0.1)


def under(policy, function, *args, **kwargs):
    """What a function makes under a dtype policy."""
    keras.config.set_dtype_policy(policy)
    try:
        return function(*args, **kwargs)
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_translations_have_the_precision_of_the_model(policy):
    """The policy by the time of the search makes no difference."""
    model, source = under(policy, made, "rev_gru", attend_to="slice"), names()["source"]
    search = [
        under(later, translator, model, beams=2, length=5)
        for later in ("float32", "mixed_bfloat16")
    ]
    (ids, scores), *others = (found_by(one, source) for one in search)
    for same_ids, same in others:
        np.testing.assert_array_equal(same_ids, ids)
        np.testing.assert_array_equal(same, scores)
    # Log-probabilities of logits in float32, whatever they are computed from.
    rtol = 1e-5 if policy == "float32" else 5e-3
    np.testing.assert_allclose(scores, log_p_of(model, source, ids), rtol=rtol)
