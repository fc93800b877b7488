"""The diversity of members: by hand, its identities, and whole models."""

import keras
import numpy as np
import pytest
from matplotlib.image import imread

from kzoo.layers import (
    AverageMembers,
    Conv2DBatchEnsemble,
    DenseBatchEnsemble,
    DenseRank1,
    DepthwiseConv2DBatchEnsemble,
    EinsumDenseBatchEnsemble,
    LSTMBatchEnsemble,
    SeparableConv2DBatchEnsemble,
    TemperatureScaling,
    TileMembers,
)
from kzoo.zoo import diversity_report, evaluate, figures
from kzoo.zoo.diversity import fast_weight_similarity, measure_diversity

RNG = np.random.default_rng(0)


def ensemble(members=3, rank=1):
    image = keras.Input((8, 8, 1), name="image")
    x = keras.layers.Rescaling(1 / 16)(keras.layers.Flatten()(image))
    layer = DenseBatchEnsemble(
        10,
        rank=rank,
        ensemble_size=members,
        alpha_initializer=keras.initializers.RandomNormal(1, 0.5, seed=1),
        gamma_initializer=keras.initializers.RandomNormal(1, 0.5, seed=2),
        name="logits",
    )
    y = layer(TileMembers(members)(x))
    return keras.Model(image, AverageMembers(members)(y), name="ensemble")


def test_two_members_by_hand():
    report = measure_diversity(
        [[[0.9, 0.1], [0.6, 0.4]], [[0.8, 0.2], [0.3, 0.7]]], labels=[0, 1]
    )
    assert (report.members, report.examples) == (2, 2)
    np.testing.assert_allclose(report.disagreement, [[0, 0.5], [0.5, 0]])
    np.testing.assert_allclose(report.accuracy, [0.5, 1.0])
    assert report.ensemble_accuracy == 0.5  # The second mean is (0.55, 0.45).
    nll = [-np.log([0.9, 0.2]).mean(), -np.log([0.6, 0.7]).mean()]
    np.testing.assert_allclose(report.nll, nll)
    assert report.ensemble_nll == pytest.approx(-np.log([0.75, 0.45]).mean())
    assert report.ambiguity == pytest.approx(np.mean(nll) - report.ensemble_nll)
    np.testing.assert_allclose(report.brier, [(0.02 + 1.28) / 2, (0.32 + 0.18) / 2])
    assert report.ensemble_brier == pytest.approx((0.125 + 2 * 0.55**2) / 2)
    assert report.variance == pytest.approx((2 * 0.15**2 + 2 * 0.25**2) / 2)
    # Of two classes a function is the log-odds, up to a factor.
    a, b = np.log([9, 4]), np.log([1.5, 3 / 7])
    cosine = a @ b / np.sqrt(a @ a * (b @ b))
    np.testing.assert_allclose(report.similarity, [[1, cosine], [cosine, 1]])
    assert report.figures() == pytest.approx(
        {
            "members": 2,
            "examples": 2,
            "disagreement": 0.5,
            "similarity": cosine,
            "member_accuracy": 0.75,
            "ensemble_accuracy": 0.5,
            "member_nll": np.mean(nll),
            "ambiguity": np.mean(nll) + np.log([0.75, 0.45]).mean(),
            "ensemble_nll": -np.log([0.75, 0.45]).mean(),
            "member_brier": (0.65 + 0.25) / 2,
            "variance": (2 * 0.15**2 + 2 * 0.25**2) / 2,
            "ensemble_brier": (0.125 + 2 * 0.55**2) / 2,
        }
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_decompositions_are_identities(seed):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(0.3 * np.ones(5), (40, 6)).astype("float32")
    probs /= probs.sum(-1, keepdims=True)
    report = measure_diversity(probs, rng.integers(0, 5, 40))
    difference = report.brier.mean() - report.ensemble_brier
    assert difference == pytest.approx(report.variance, abs=1e-6)
    assert report.ambiguity > 0
    shares = report.disagreement
    assert (shares == shares.T).all() and (np.diag(shares) == 0).all()


def test_identical_members_do_not_differ():
    one = RNG.dirichlet(np.ones(4), (30, 1)).astype("float32")
    report = measure_diversity(np.repeat(one, 3, 1), RNG.integers(0, 4, 30))
    assert (report.disagreement == 0).all()
    np.testing.assert_allclose(report.similarity, 1, atol=1e-12)
    assert report.ambiguity == pytest.approx(0, abs=1e-12)
    assert report.variance == pytest.approx(0, abs=1e-12)


def test_a_probability_of_zero_is_no_infinity():
    report = measure_diversity([[[1.0, 0.0], [0.0, 1.0]]], [1])
    assert np.isfinite(list(report.figures().values())).all()
    assert report.ensemble_nll == pytest.approx(np.log(2))


@pytest.mark.parametrize("rank", [1, 2])
def test_fast_weights_are_compared_as_matrices(rank):
    model = ensemble(rank=rank)
    layer = model.get_layer("logits")
    r, s = (
        keras.ops.convert_to_numpy(w).reshape(rank, 3, -1)
        for w in (layer.alpha, layer.gamma)
    )
    f = np.einsum("kmi,kmo->mio", r, s).reshape(3, -1)
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    ((name, found),) = fast_weight_similarity(model).items()
    assert name == "logits"
    np.testing.assert_allclose(found, f @ f.T, rtol=1e-5)
    x = keras.Input((8, 8, 1))
    nested = fast_weight_similarity(keras.Model(x, model(x)))
    np.testing.assert_allclose(list(nested.values()), [found])


NORMAL = {
    f"{name}_initializer": keras.initializers.RandomNormal(1, 1, seed=seed)
    for seed, name in enumerate(("alpha", "gamma"), 1)
}
PROPORTIONS = {
    "depthwise": DepthwiseConv2DBatchEnsemble(2, depth_multiplier=2, **NORMAL),
    "grouped": Conv2DBatchEnsemble(4, 2, rank=2, groups=2, **NORMAL),
    "einsum": EinsumDenseBatchEnsemble("bthd,hdk->bthk", (5, 2, 6), **NORMAL),
}


@pytest.mark.parametrize("kind", PROPORTIONS)
def test_only_what_a_kernel_is_multiplied_by_is_compared(kind):
    layer = PROPORTIONS[kind]
    x = keras.Input((5, 2, 4) if kind == "einsum" else (5, 5, 4))
    model = keras.Model(x, layer(TileMembers(4)(x)))
    (found,) = fast_weight_similarity(model).values()
    w = keras.ops.convert_to_numpy(layer.shared.kernel)
    f = [keras.ops.convert_to_numpy(layer.member(i).kernel) / w for i in range(4)]
    f = np.reshape(f, (4, -1)).astype("float64")
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    np.testing.assert_allclose(found, f @ f.T, rtol=1e-4, atol=1e-5)


def test_signs_that_cancel_in_a_depthwise_kernel_are_no_difference():
    layer = DepthwiseConv2DBatchEnsemble(3, ensemble_size=2)
    x = keras.Input((5, 5, 2))
    model = keras.Model(x, layer(TileMembers(2)(x)))
    for weight in (layer.alpha, layer.gamma):
        weight.assign([[1.0, 1.0], [-1.0, 1.0]])
    (found,) = fast_weight_similarity(model).values()
    np.testing.assert_allclose(found, 1, rtol=1e-12)


def test_a_separable_and_a_rank_1_bayesian_layer_are_compared_by_r_and_s():
    x = keras.Input((5, 5, 2))
    separable = SeparableConv2DBatchEnsemble(3, 2, ensemble_size=2, **NORMAL)
    y = keras.layers.Flatten()(separable(TileMembers(2)(x)))
    bayesian = DenseRank1(2, ensemble_size=2, num_examples=1)
    model = keras.Model(x, bayesian(y))
    means = bayesian.alpha.posterior.mean(), bayesian.gamma.posterior.mean()
    found = fast_weight_similarity(model)
    assert list(found) == [separable.path, bayesian.path]
    fast = (separable.alpha, separable.gamma), means
    for cosine, weights in zip(found.values(), fast, strict=True):
        grams = (w @ w.T for w in map(keras.ops.convert_to_numpy, weights))
        expected = [g[0, 1] / np.sqrt(g[0, 0] * g[1, 1]) for g in grams]
        np.testing.assert_allclose(cosine[0, 1], np.prod(expected), rtol=1e-5)


def test_recurrent_kernels_have_fast_weights_of_their_own():
    x = keras.Input((4, 3))
    y = LSTMBatchEnsemble(2, ensemble_size=2, name="lstm")(TileMembers(2)(x))
    found = fast_weight_similarity(keras.Model(x, y))
    assert [name.split("/")[-1] for name in found] == ["cell", "recurrent"]
    for cosine in found.values():
        np.testing.assert_allclose(cosine, 1, rtol=1e-6)  # They start as ones.


@pytest.mark.slow
def test_a_report_of_a_model(data_dir, tmp_path):
    model = ensemble()
    options = {"split": "validation", "data_dir": data_dir}
    report = diversity_report(model, batch_size=50, **options)
    measured = evaluate(model, **options)
    for name in ("nll", "brier", "accuracy"):
        found = getattr(report, f"ensemble_{name}")
        assert found == pytest.approx(measured[name], rel=1e-4)
    assert report.examples == 180 and set(report.fast_weights) == {"logits"}
    text = str(report)
    assert text.startswith("3 members, 180 examples\npairs that disagree ")
    assert f"ambiguity {report.ambiguity:.4f}" in text and "  logits " in text
    # The temperature of the whole plays no part.
    hot = keras.Model(model.input, TemperatureScaling(5.0)(model.outputs[0]))
    assert diversity_report(hot, **options).figures() == pytest.approx(
        report.figures(), rel=1e-4
    )
    for name, drawn in (("with", report), ("without", measured_again(report))):
        path = figures.draw_diversity(tmp_path / f"{name}.png", drawn)
        assert imread(path)[..., :3].std() > 0.05


def measured_again(report):
    """A report of ten members, without fast weights."""
    probs = RNG.dirichlet(np.ones(4), (report.examples, 10))
    return measure_diversity(probs, RNG.integers(0, 4, report.examples))


def test_what_does_not_fit_is_refused():
    probs = np.full((2, 2, 2), 0.5)
    with pytest.raises(ValueError, match=r"\[N, M, C\].*\(2, 2, 2\) and \(3,\)"):
        measure_diversity(probs, [0, 1, 1])
    with pytest.raises(ValueError, match="labels from 0 to 1. Received"):
        measure_diversity(probs, [0, 2])
    with pytest.raises(ValueError, match="at least 2 members.*a model of one"):
        measure_diversity(probs[:, :1], [0, 1])
    assert fast_weight_similarity(keras.Sequential([keras.layers.Dense(1)])) == {}
