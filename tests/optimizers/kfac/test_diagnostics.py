import keras
import numpy as np
import pytest
from keras import ops

from harness.training import QUICK
from kzoo.layers import DenseBatchEnsemble
from kzoo.optimizers import (
    KFAC,
    Adaptation,
    KFACDiagnostics,
    Lookahead,
    with_fast_weights,
)
from kzoo.optimizers.kfac.diagnostics import condition_numbers


def test_condition_numbers_are_those_of_the_damped_factors():
    a, g = np.diag([4.0, 1.0, 1.0]), np.diag([0.5, 0.0])
    pi, root = np.sqrt(2 / 0.25), 0.1  # λ is 0.01.
    found = condition_numbers({"A": a, "G": g}, 0.01)
    expected = {
        "A": (4 + pi * root) / (1 + pi * root),
        "G": (0.5 + root / pi) / (root / pi),
    }
    assert found == pytest.approx(expected, rel=1e-5)
    # Of a table's factor the diagonal alone is there.
    assert condition_numbers({"A": np.diag(a), "G": g}, 0.01) == pytest.approx(found)
    # Of groups the worst one's: each is damped by its own part.
    both = condition_numbers(
        {"A": np.stack([a, 0 * a + np.eye(3)]), "G": g[None]}, 0.01
    )
    assert both["A"] == pytest.approx(expected["A"], rel=1e-5)
    # Along a basis, or without one, λ is added as it is.
    s = {"S": np.array([[3.0, 0.0], [1.0, 2.0]])}
    assert condition_numbers({"A": a, "G": g, **s}, 0.5) == pytest.approx({"S": 7})
    assert condition_numbers({"D": s["S"]}, 1.0) == pytest.approx({"D": 4})


def network():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    return model


def test_it_adds_the_figures_of_the_epoch_to_the_logs(tmp_path):
    model, rng = network(), np.random.default_rng(1)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    adaptation = Adaptation(damping_interval=1, gamma_interval=2)
    optimizer = KFAC(model, damping=0.1, fisher="exact", adaptation=adaptation)
    model.compile(optimizer, "mse", **QUICK)
    before, weights = model.evaluate(x, y, verbose=0), model.get_weights()
    path, log = model.layers[0].kernel.path, tmp_path / "log.csv"
    callbacks = [KFACDiagnostics(), keras.callbacks.CSVLogger(log)]
    history = model.fit(x, y, callbacks=callbacks, verbose=0).history
    found = {name: v[0] for name, v in history.items() if name.startswith("kfac/")}
    change = [b - a for a, b in zip(weights, model.get_weights(), strict=True)]
    norm = np.sqrt(sum(np.sum(delta**2) for delta in change))
    assert found["kfac/update_norm"] == pytest.approx(norm, rel=1e-4)
    assert found[f"kfac/{path}/update_norm"] == pytest.approx(norm, rel=1e-4)
    assert found["kfac/damping"] == pytest.approx(float(optimizer.damping))
    assert found["kfac/gamma"] == pytest.approx(float(optimizer.gamma))
    assert found["kfac/skipped_updates"] == 0
    # Linear regression is quadratic: but for λ, the model of the loss is the loss.
    after = model.evaluate(x, y, verbose=0)
    expected = 0.5 * sum(
        np.sum(g * delta)
        for g, delta in zip(slopes(weights, x, y), change, strict=True)
    )
    assert found["kfac/ratio"] == pytest.approx((after - before) / expected, rel=1e-3)
    conditions = condition_numbers(optimizer.factors[path], float(optimizer.gamma) ** 2)
    for name, number in conditions.items():
        assert found[f"kfac/{path}/condition_{name}"] == pytest.approx(number)
    assert "kfac/damping" in log.read_text()


def test_tensorboard_writes_the_figures_of_every_epoch(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator
    from tensorflow import make_ndarray

    model = network()
    model.compile(KFAC(model), "mse", **QUICK)
    board = keras.callbacks.TensorBoard(tmp_path)
    x, y = np.random.default_rng(1).normal(size=(2, 8, 3))
    history = model.fit(
        x, y[:, :2], epochs=2, callbacks=[KFACDiagnostics(), board], verbose=0
    ).history
    events = event_accumulator.EventAccumulator(str(tmp_path / "train")).Reload()
    figures = {name: v for name, v in history.items() if name.startswith("kfac/")}
    assert "kfac/update_norm" in figures
    for name, values in figures.items():
        written = [
            make_ndarray(e.tensor_proto) for e in events.Tensors(f"epoch_{name}")
        ]
        np.testing.assert_allclose(written, values, rtol=1e-6)


def slopes(weights, x, y):
    """∇h of the mean squared error."""
    kernel, bias = weights
    error = 2 * (x @ kernel + bias - y) / y.size
    return x.T @ error, error.sum(0)


def test_it_finds_a_kfac_inside_of_another_optimizer_and_refuses_others():
    x, y = np.ones((4, 3)), np.ones((4, 2))
    model = network()
    model.compile(Lookahead(KFAC(model, damping=0.5)), "mse", **QUICK)
    callback = KFACDiagnostics(factors=False)
    history = model.fit(x, y, callbacks=[callback], verbose=0).history
    names = {name for name in history if name.startswith("kfac/")}
    assert names == {
        f"kfac/{name}"
        for name in ("damping", "skipped_inverses", "skipped_updates", "update_norm")
    }
    assert history["kfac/damping"] == [0.5]
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="compiled with KFAC. Received"):
        model.fit(x, y, callbacks=[callback], verbose=0)


def test_of_two_it_adds_the_figures_of_all_weights():
    layer = DenseBatchEnsemble(2, ensemble_size=2, name="dense")
    model = keras.Sequential([keras.Input((3,)), layer])
    optimizer = KFAC(model, damping=0.5, fisher="exact")
    model.compile(with_fast_weights(optimizer, model), "mse", **QUICK)
    before = model.get_weights()
    x, y = np.random.default_rng(0).normal(size=(2, 4, 3))
    model.train_on_batch(x, y[:, :2])
    optimizer.damping = 2.0
    change = [b - a for a, b in zip(before, model.get_weights(), strict=True)]
    fast, shared = model.optimizer.optimizers
    fast._skipped.assign(2)
    shared._skipped.assign(3)
    logs, callback = {}, KFACDiagnostics()
    callback.set_model(model)
    callback.on_epoch_end(0, logs)
    norm = np.sqrt(sum(np.sum(delta**2) for delta in change))
    assert logs["kfac/update_norm"] == pytest.approx(norm, rel=1e-4)
    assert logs["kfac/skipped_updates"] == 5
    assert logs["kfac/damping"] == 2.0
    conditions = {name.split("/")[-2] for name in logs if "condition" in name}
    assert conditions == {v.name for v in model.trainable_variables}


def test_the_length_of_an_update_of_half_precision():
    dense = keras.layers.Dense(2, dtype="float16")
    model = keras.Sequential([keras.Input((3,)), dense])
    optimizer = KFAC(model)
    model.compile(optimizer, "mse", auto_scale_loss=False, **QUICK)
    optimizer.build(model.trainable_variables)
    for m in optimizer._momentums:
        m.assign(1e-5 * np.ones(m.shape))
    logs, callback = {}, KFACDiagnostics(factors=False)
    callback.set_model(model)
    callback.on_epoch_end(0, logs)
    assert logs["kfac/update_norm"] == pytest.approx(1e-5 * 8**0.5, rel=0.01)


def test_factors_of_neighbouring_steps_are_not_divided_by():
    factors = {"A": np.diag([1.0, 3.0]), "G": np.diag([2.0, 2.0])}
    conditions = condition_numbers(factors, 0.5)
    more = {"T": 4.0, "A_next": 9 * np.ones((2, 2)), "G_next": np.ones((2, 2))}
    assert condition_numbers({**factors, **more}, 0.5) == conditions


@pytest.mark.parametrize("name", ["S", "D"])
def test_a_damping_may_be_a_tensor(name):
    # As γ² is, and what a schedule gives.
    factor = ops.convert_to_tensor(np.array([[0.0, 3.0]], "float32"))
    found = condition_numbers({name: factor}, ops.convert_to_tensor(1.0))
    assert found == {name: 4.0}
