"""The Transformer: written out, its masks, its tied table, with other layers."""

from functools import partial

import keras
import numpy as np
import pytest

from harness import session
from harness.by_hand import randomize, relu, softmax, value
from harness.check import Check
from harness.fresh import record_case, record_export
from harness.training import QUICK, check_lowering, check_steps, forward, train
from kzoo.layers import (
    DenseBatchEnsemble,
    DenseFlipout,
    EmbeddingBatchEnsemble,
    EmbeddingFlipout,
    LayerNormalizationBatchEnsemble,
    MultiHeadAttentionBatchEnsemble,
    MultiHeadAttentionFlipout,
    PosteriorMean,
    batch_ensemble_initializer,
    from_batch_ensemble,
    from_bayesian,
)
from kzoo.zoo.models.transformer import transformer

V, D = 11, 8
SMALL = {"layers": 1, "width": D, "heads": 2, "hidden": 12, "dropout": 0.0}


def sentences(seed=0, rows=4):
    """Ids of sources and targets, some of them padded."""
    rng = np.random.default_rng(seed)
    source, target = rng.integers(1, V, (rows, 5)), rng.integers(1, V, (rows, 4))
    source[0, 3:] = 0
    target[-1, 2:] = 0
    return {"source": source.astype("int32"), "target": target.astype("int32")}


def made(seed=0, **changes):
    model = transformer(V, **{**SMALL, **changes})
    randomize(model, seed)
    return model


def logits(model, **ids):
    return value(model(ids))


def written_out(model, source, target, pre_norm):
    """The paper's formulas, one after the other."""
    table = value(model.get_layer("embedding").embeddings)

    def look_up(ids):
        x = table[ids] * np.sqrt(D)
        for t in range(ids.shape[1]):
            for i in range(0, D, 2):
                angle = t / 10000 ** (i / D)
                x[:, t, i] += np.sin(angle)
                x[:, t, i + 1] += np.cos(angle)
        return x

    def norm(x, name):
        gamma, beta = map(value, model.get_layer(f"{name}_norm").weights)
        variance = x.var(-1, keepdims=True)
        return gamma * (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6) + beta

    def around(f, x, name):
        return x + f(norm(x, name)) if pre_norm else norm(x + f(x), name)

    def attention(name, value_of, seen, causal=False):
        layer = model.get_layer(name)
        q, bq, k, bk, v, bv, o, bo = map(value, layer.weights)

        def f(x):
            at = x if value_of is None else value_of
            queries = np.einsum("btd,dhk->bhtk", x, q) + bq[:, None]
            keys = np.einsum("bsd,dhk->bhsk", at, k) + bk[:, None]
            values = np.einsum("bsd,dhk->bhsk", at, v) + bv[:, None]
            scores = queries @ keys.swapaxes(2, 3) / np.sqrt(D // 2)
            may = np.broadcast_to(seen[:, None, None, :], scores.shape)
            if causal:
                may = may & np.tril(np.ones(scores.shape[2:], bool))
            weights = softmax(np.where(may, scores, -np.inf))
            return np.einsum("bhtk,hkd->btd", weights @ values, o) + bo

        return f

    def feed_forward(name):
        (w1, b1), (w2, b2) = (
            map(value, model.get_layer(f"{name}_{i}").weights) for i in (1, 2)
        )
        return lambda x: relu(x @ w1 + b1) @ w2 + b2

    x, seen = look_up(source), source != 0
    for i in range(2):
        name = f"encoder{i}_attention"
        x = around(attention(name, None, seen), x, name)
        x = around(feed_forward(f"encoder{i}_dense"), x, f"encoder{i}_dense")
    encoded = norm(x, "encoder") if pre_norm else x
    x = look_up(target)
    for i in range(2):
        name = f"decoder{i}_attention"
        x = around(attention(name, None, target != 0, causal=True), x, name)
        name = f"decoder{i}_source"
        x = around(attention(name, encoded, seen), x, name)
        x = around(feed_forward(f"decoder{i}_dense"), x, f"decoder{i}_dense")
    x = norm(x, "decoder") if pre_norm else x
    return x @ table.T


@pytest.mark.parametrize("pre_norm", [False, True])
def test_equals_the_paper_written_out(pre_norm):
    model = made(layers=2, pre_norm=pre_norm)
    ids = sentences()
    expected = written_out(model, **ids, pre_norm=pre_norm)
    found = keras.ops.convert_to_numpy(forward(model, ids, False)[0])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_padding_and_later_positions_change_nothing():
    model = made()
    ids = sentences()
    source, target = ids["source"], ids["target"]
    before = logits(model, **ids)
    longer = np.pad(source, [(0, 0), (0, 3)])
    found = logits(model, source=longer, target=target)
    np.testing.assert_allclose(found, before, atol=1e-6)
    longer = np.pad(target, [(0, 0), (0, 2)])
    found = logits(model, source=source, target=longer)
    np.testing.assert_allclose(found[:, :4], before, atol=1e-6)
    later = np.where(np.arange(4) < 2, target, target % (V - 1) + 1)
    found = logits(model, source=source, target=later)
    np.testing.assert_allclose(found[:, :2], before[:, :2], atol=1e-6)
    assert np.abs(found[:, 2:] - before[:, 2:]).max(-1).min() > 1e-3
    # What padding looks like is seen nowhere, also between other ids.
    target = np.array([[3, 0, 5, 1]] * 4)
    before = logits(model, source=source, target=target)
    table = model.get_layer("embedding").embeddings
    rows = value(table)
    rows[0] = 7.0
    table.assign(rows)
    found = logits(model, source=source, target=target)[:, [0, 2, 3], 1:]
    np.testing.assert_allclose(found, before[:, [0, 2, 3], 1:], atol=1e-6)


def test_losses_pass_over_padding():
    model, ids = made(), sentences()
    labels = np.random.default_rng(1).integers(1, V, ids["target"].shape)
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() == "jax",
    )
    found = np.ravel(model.test_on_batch(ids, labels))[0]
    log_probs = np.log(softmax(logits(model, **ids)))
    nll = -np.take_along_axis(log_probs, labels[..., None], -1)[..., 0]
    assert found == pytest.approx(nll[ids["target"] != 0].mean(), rel=1e-5)
    assert abs(found - nll.mean()) > 1e-3


def test_one_table_is_all_there_is_of_the_vocabulary():
    def attention(d):
        return 4 * (d * d + d) + 2 * d

    model = transformer(V, **{**SMALL, "layers": 3})
    feed_forward = 2 * D * 12 + 12 + D + 2 * D
    expected = V * D + 3 * (3 * attention(D) + 2 * feed_forward)
    assert model.count_params() == expected
    assert [v.shape for v in model.weights if V in v.shape] == [(V, D)]
    # Before the first layer and behind the last of each stack.
    pre_norm = transformer(V, **{**SMALL, "layers": 3}, pre_norm=True)
    assert pre_norm.count_params() == expected + 2 * 2 * D


def test_dropout_where_the_paper_has_it():
    model = transformer(V, **{**SMALL, "dropout": 0.3})
    layers = [x for x in model.layers if isinstance(x, keras.layers.Dropout)]
    assert len(layers) == 2 + 2 + 3 and {x.rate for x in layers} == {0.3}


def batch_ensemble(members=2):
    """The factories of a BatchEnsemble."""
    method = {
        "ensemble_size": members,
        "alpha_initializer": batch_ensemble_initializer(-0.5),
        "gamma_initializer": batch_ensemble_initializer(-0.5),
    }
    return {
        "embedding": partial(EmbeddingBatchEnsemble, **method),
        "attention": partial(MultiHeadAttentionBatchEnsemble, **method),
        "dense": partial(DenseBatchEnsemble, **method),
        "normalization": partial(LayerNormalizationBatchEnsemble, members),
        "ensemble_size": members,
    }


@pytest.mark.slow
def test_members_are_transformers(tmp_path):
    model = made(**batch_ensemble())
    ids, single, probs = sentences(), made(), []
    for m in range(2):
        for layer in model.layers:
            if hasattr(layer, "member") and layer.name != "all_ids":
                plain = layer.member(m)
                single.get_layer(layer.name).set_weights(plain.get_weights())
        probs.append(softmax(logits(single, **ids)))
    plain = from_batch_ensemble(model, member=1)
    np.testing.assert_allclose(softmax(logits(plain, **ids)), probs[1], atol=1e-5)
    assert np.abs(probs[0] - probs[1]).max() > 1e-2
    found, in_training = forward(model, ids, False, True)
    np.testing.assert_allclose(softmax(value(found)), np.mean(probs, 0), atol=1e-5)
    # In training the first two rows are one member's, the others the other's.
    expected = np.concatenate([probs[0][:2], probs[1][2:]])
    np.testing.assert_allclose(np.exp(value(in_training)), expected, atol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(forward(loaded, ids, False)[0], found, atol=1e-6)


@pytest.mark.slow
@pytest.mark.tensorflow  # Random layers take JAX minutes to compile.
def test_flipout_version_is_the_plain_one_at_the_mean_of_its_weights():
    model = transformer(
        V,
        **SMALL,
        embedding=partial(EmbeddingFlipout, num_examples=10),
        attention=partial(MultiHeadAttentionFlipout, num_examples=10),
        dense=partial(DenseFlipout, num_examples=10),
    )
    ids = sentences()
    plain = transformer(V, **SMALL)
    plain.set_weights(from_bayesian(model).get_weights())
    mean = PosteriorMean(model).predict(ids, verbose=0)
    np.testing.assert_allclose(mean, plain.predict(ids, verbose=0), atol=1e-5)
    draws = [value(model(ids, training=True)) for _ in range(2)]
    assert np.abs(draws[0] - draws[1]).max() > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"width": 9},
        {"width": 12, "heads": 5},
        {"width": 3, "heads": 1},
        {"layers": 0},
        {"hidden": 0},
        {"heads": 0},
        {"dropout": 1.0},
        {"vocabulary": 0},
        {"ensemble_size": 0},
    ],
)
def test_refusals(change):
    with pytest.raises(ValueError, match=f"Received: {[*change][0]}="):
        transformer(**{"vocabulary": V, **SMALL, **change})


# What the harness asks of registered models, which are classifiers of one input.


@pytest.mark.slow
def test_contract():
    def compiled(mode):
        keras.utils.set_random_seed(0)
        model = transformer(V, **SMALL)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, **mode)
        return model

    def labels(ids):
        return ids["target"] % (V - 1) + 1

    batches = [(ids, labels(ids)) for ids in map(sentences, range(2))]
    check_steps(compiled, batches, stops=(1,), tol=1e-3)
    model = compiled({"jit_compile": True})
    model.optimizer.build(model.trainable_variables)
    check_lowering(model, batches[0])

    model, ids = compiled(QUICK), sentences()
    model.optimizer.build(model.trainable_variables)
    expected = forward(model, ids, False)[0]
    with Check("save") as check:
        file = session.get().folder / "transformer.keras"
        model.save(file)
        loaded = keras.saving.load_model(file)
        check.close("outputs", forward(loaded, ids, False)[0], expected)
        clone = keras.models.clone_model(model)
        clone.set_weights(model.get_weights())
        check.close("outputs", forward(clone, ids, False)[0], expected)
    record_export(model.name, model, [ids, sentences(1, rows=2)])
    record_case(
        model.name,
        model,
        [type(x) for x in model.layers],
        outputs=(ids, keras.ops.convert_to_numpy(expected)),
        steps=lambda: (batches, train(model, batches)),
        tol=1e-3,
    )


@pytest.mark.parametrize(
    "policy",
    [
        # JAX has no attention in half precision on a CPU.
        pytest.param("mixed_float16", marks=pytest.mark.tensorflow),
        "mixed_bfloat16",
    ],
)
def test_mixed_precision(policy):
    ids = sentences()
    expected = softmax(value(forward(made(), ids, False)[0]))
    keras.config.set_dtype_policy(policy)
    try:
        model = made()
    finally:
        keras.config.set_dtype_policy("float32")
    found = forward(model, ids, False)[0]
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    assert {str(v.dtype) for v in model.trainable_variables} == {"float32"}
    np.testing.assert_allclose(softmax(value(found)), expected, atol=0.1)
