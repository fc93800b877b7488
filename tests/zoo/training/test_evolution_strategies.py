"""Evolution strategies: one pass against each member alone, and what they estimate."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from harness.training import QUICK, XLA, check_compiled, check_lowering, check_resume
from kzoo.zoo import EvolutionStrategies

RNG = np.random.default_rng(0)
# JAX has no 64-bit types unless they are enabled.
EXACT = "float64" if keras.backend.backend() == "tensorflow" else "float32"
TOL = {"float64": 1e-6, "float32": 2e-5}[EXACT]


def value(x):
    return keras.ops.convert_to_numpy(x)


def dense(dtype="float32"):
    """Dense layers over one more axis, one of them without a bias, one used twice."""
    x = keras.Input((3, 4), name="x")
    twice = layers.Dense(4, activation="tanh", dtype=dtype)
    y = layers.Dense(2, use_bias=False, dtype=dtype)(twice(twice(x)))
    return keras.Model(x, layers.Flatten(dtype=dtype)(y))


def einsum(dtype="float32"):
    """Axes in the kernel and both sides, a bias that broadcasts, a nested model."""
    first = layers.EinsumDense(
        "abc,bcde->abde", (3, 2, 5), bias_axes="d", activation="tanh", dtype=dtype
    )
    inner = [keras.Input((3, 2, 5)), layers.EinsumDense("...x,x->...x", 5, dtype=dtype)]
    inner = keras.Sequential(inner)
    return keras.Sequential([keras.Input((3, 4), name="x"), first, inner])


def conv(dtype="float32"):
    """Groups, strides, padding before, and all that has no weights between."""
    return keras.Sequential(
        [
            keras.Input((12,), name="x"),
            layers.Rescaling(0.5, dtype=dtype),
            layers.Reshape((6, 2), dtype=dtype),
            layers.Conv1D(4, 3, padding="causal", activation="relu", dtype=dtype),
            layers.Dropout(0.5, dtype=dtype),
            layers.Conv1D(6, 2, strides=2, groups=2, dtype=dtype),
            layers.Reshape((3, 3, 2), dtype=dtype),
            layers.Conv2D(3, 2, padding="same", dtype=dtype),
            layers.Flatten(dtype=dtype),
        ]
    )


def strategy(model, **arguments):
    return EvolutionStrategies(model, **{"stddev": 0.3, "seed": 1, **arguments})


def set_weights(model, weights):
    for v, w in zip(model.trainable_variables, weights, strict=True):
        v.assign(w)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (dense, {"population": 6}),
        (dense, {"population": 9, "bases": 3, "antithetic": False}),
        (einsum, {"population": 8, "bases": 2}),
        (conv, {"population": 8, "bases": 2}),
    ],
)
def test_one_pass_is_that_of_each_members_own_weights(make, arguments):
    model = make(EXACT)
    for v in model.trainable_variables:  # Biases too.
        v.assign(RNG.normal(size=v.shape))
    members = strategy(model, **arguments)
    count, mirrored = members.population, members.antithetic
    x = RNG.normal(size=(2, *model.input_shape[1:])).astype("float32")
    found = members.act(np.concatenate([x] * count))
    found = found.reshape(count, 2, *found.shape[1:])
    centre = [value(v) for v in model.trainable_variables]
    weights = [members.member_weights(n) for n in range(count)]
    for n in range(count):
        set_weights(model, weights[n])
        np.testing.assert_allclose(found[n], value(model(x)), TOL, TOL)
    set_weights(model, centre)
    # All entries are perturbed, by N(0, σ²), of the same size in a base's kernels.
    bases = members.bases or 1
    pairs = np.array_split(np.arange(count), bases)
    for i, v in enumerate(model.trainable_variables):
        delta = np.stack([w[i] - centre[i] for w in weights])
        assert np.abs(delta).min() > 0
        for base in pairs:
            if v.path.endswith("kernel"):
                size = np.abs(delta[base])
                np.testing.assert_allclose(size, size[:1] + 0 * size, 1e-3, 1e-5)
            if mirrored:
                half = len(base) // 2
                np.testing.assert_allclose(
                    delta[base[:half]], -delta[base[half:]], 1e-3, 1e-5
                )


def test_perturbations_have_the_given_deviation():
    model = keras.Sequential([keras.Input((50,)), layers.Dense(40)])
    members = strategy(model, population=64, stddev=0.25, bases=8)
    centre = [value(v) for v in model.trainable_variables]
    drawn = [members.member_weights(n) for n in range(0, 64, 8)]
    kernel, bias = (np.stack([w[i] for w in drawn]) - centre[i] for i in (0, 1))
    assert kernel.std() == pytest.approx(0.25, rel=0.03)
    assert bias.std() == pytest.approx(0.25, rel=0.15)
    # Two bases have nothing in common.
    correlation = np.corrcoef(np.abs(kernel.reshape(8, -1)))
    assert np.abs(correlation - np.eye(8)).max() < 0.12


@pytest.mark.parametrize("antithetic", [True, False])
def test_the_step_is_the_weighted_sum_of_the_members_perturbations(antithetic):
    model = dense()
    members = strategy(model, population=12, bases=2, antithetic=antithetic)
    members.shaping = None
    members.compile(keras.optimizers.SGD(1.0))
    centre = [value(v) for v in model.trainable_variables]
    fitness = RNG.normal(5.0, 1.0, size=12)
    drawn = [members.member_weights(n) for n in range(12)]
    members.update(fitness)
    # The baseline: the mean of all, or of the others.
    u = -(fitness - fitness.mean()) * (1 if antithetic else 12 / 11)
    for i, v in enumerate(model.trainable_variables):
        delta = np.stack([w[i] for w in drawn]) - centre[i]
        g = np.tensordot(u, delta, 1) / (12 * 0.3**2)
        np.testing.assert_allclose(centre[i] - value(v), g, 1e-3, 1e-4)
    again = [members.member_weights(n) for n in range(12)]
    assert (
        np.abs(again[0][0] - value(model.trainable_variables[0]))[0, 0]
        != abs(drawn[0][0] - centre[0])[0, 0]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [{}, {"bases": 4}, {"antithetic": False}],
    ids=lambda a: str(a),
)
def test_the_mean_estimate_is_the_gradient_of_the_smoothed_loss(arguments):
    # For a quadratic loss E[f(W + ΔW)] is f(W) and a constant: its gradient is f's.
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    members = strategy(model, population=64, shaping=None, **arguments)
    members.compile(keras.optimizers.SGD(1.0), "mse")
    x, y = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 2))
    centre = [value(v) for v in model.trainable_variables]
    error = (x @ centre[0] + centre[1] - y) / 5  # The mean over 5 rows and 2 targets.
    exact = np.concatenate([(x.T @ error).ravel(), error.sum(0)])
    found = []
    for _ in range(300):
        members.train_on_batch(x, y)
        now = [value(v) for v in model.trainable_variables]
        found.append(np.concatenate([(centre[i] - now[i]).ravel() for i in (0, 1)]))
        set_weights(model, centre)
    found = np.array(found, "float64")
    error = found.std(0) / np.sqrt(len(found))
    assert error.max() < 0.3 * np.abs(exact).max()  # So that the next line says much.
    assert (np.abs(found.mean(0) - exact) < 4.5 * error).all()


@pytest.mark.parametrize("shaping", ["centered_ranks", None])
def test_even_orders_cancel_between_mirrored_members(shaping):
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(2, kernel_initializer="zeros")]
    )
    members = strategy(model, population=32, shaping=shaping)
    members.compile(keras.optimizers.SGD(1.0), "mse")
    x = RNG.normal(size=(5, 3))
    members.train_on_batch(x, np.zeros((5, 2)))  # F = |x ΔW_n + Δb_n|²
    for v in model.trainable_variables:
        np.testing.assert_allclose(value(v), 0, atol=1e-6)
    members.train_on_batch(x, np.ones((5, 2)))  # With an odd order.
    assert np.abs(value(model.trainable_variables[0])).max() > 1e-2


def test_ranks():
    members = strategy(dense(), population=6)
    losses = np.array([3.0, 1.0, 1.0, np.inf, np.nan, -2.0], "float32")
    found = value(members._utilities(keras.ops.convert_to_tensor(losses)))
    expected = np.array([3, 1.5, 1.5, 4.5, 4.5, 0]) / 5 - 0.5
    np.testing.assert_allclose(found, expected, atol=1e-6)


def blobs():
    y = np.arange(90) % 3
    x = RNG.normal(size=(90, 2)) + 4 * np.array([[0, 0], [1, 0], [0, 1]])[y]
    return x.astype("float32"), y


def classifier(**arguments):
    keras.utils.set_random_seed(0)
    body = [layers.Dense(8, "tanh"), layers.Dropout(0.5, seed=0), layers.Dense(3)]
    model = keras.Sequential([keras.Input((2,)), *body])
    return strategy(model, **{"population": 32, "stddev": 0.1, **arguments})


def error_rate(y_true, y_pred):
    """A loss that has no gradient."""
    wrong = keras.ops.argmax(y_pred, -1) != keras.ops.cast(y_true, "int32")
    return keras.ops.cast(wrong, "float32")


@pytest.mark.slow
def test_learns_by_fit_also_without_a_gradient():
    x, y = blobs()
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for loss, stddev in ((cross_entropy, 0.1), (error_rate, 0.5)):
        members = classifier(stddev=stddev)
        members.compile(keras.optimizers.Adam(0.1), loss, metrics=["accuracy"])
        before = members.evaluate(x, y, verbose=0)
        history = members.fit(x, y, batch_size=45, epochs=30, verbose=0).history
        after = members.evaluate(x, y, verbose=0)
        assert after[0] < before[0] - 0.1 and after[1] > 0.85
        # What is shown is of the model itself.
        members.model.compile(loss=loss, metrics=["accuracy"])
        alone = members.model.evaluate(x, y, verbose=0)
        np.testing.assert_allclose(after, alone, rtol=1e-5)
        assert history["accuracy"][-1] > 0.85


def cart_pole(members, policy, steps=100):
    """Steps that a pole stays up over a cart, of each of some carts.

    Equations of Barto, Sutton, Anderson, 1983, a step of 0.02 s.
    """
    x, v, angle, turn = RNG.uniform(-0.05, 0.05, size=(4, members))
    alive, survived = np.ones(members, bool), np.zeros(members)
    for _ in range(steps):
        state = np.stack([x, v, angle, turn], 1).astype("float32")
        force = np.where(policy(state)[:, 0] > 0, 10.0, -10.0)
        sin, cos = np.sin(angle), np.cos(angle)
        push = (force + 0.05 * turn**2 * sin) / 1.1
        spin = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        pull = push - 0.05 * spin * cos / 1.1
        x, v = x + 0.02 * v, v + 0.02 * pull
        angle, turn = angle + 0.02 * turn, turn + 0.02 * spin
        alive = alive & (np.abs(x) < 2.4) & (np.abs(angle) < np.pi / 15)
        survived += alive
        x, v, angle, turn = (np.where(alive, s, 0) for s in (x, v, angle, turn))
    return survived


@pytest.mark.slow
def test_learns_to_balance_a_pole():
    keras.utils.set_random_seed(0)
    policy = keras.Sequential([keras.Input((4,)), layers.Dense(1, use_bias=False)])
    policy.trainable_variables[0].assign(np.zeros((4, 1)))
    members = strategy(policy, population=64, stddev=0.5)
    members.compile(keras.optimizers.Adam(0.2))
    before = cart_pole(64, members.act).mean()
    for _ in range(8):
        members.update(cart_pole(64, members.act))
    after = cart_pole(64, lambda state: state @ value(policy.trainable_variables[0]))
    assert before < 60 and after.mean() > 90


def compiled(mode):
    members = classifier(population=8)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    members.compile(keras.optimizers.SGD(0.05, momentum=0.9), cross_entropy, **mode)
    return members


@pytest.mark.slow
def test_trains_the_same_compiled_and_resumed_and_lowers(tmp_path):
    x, y = blobs()
    batches = [(x[i : i + 6], y[i : i + 6]) for i in range(0, 18, 6)]
    whole = check_resume(compiled, batches, tmp_path, (1,), QUICK)
    if QUICK != XLA:
        check_compiled(compiled, batches, whole, modes=(XLA,))
    model = compiled(XLA)
    model.optimizer.build(model.trainable_variables)
    check_lowering(model, batches[0])


def test_goes_on_in_the_middle_of_an_episode(tmp_path):
    x = RNG.normal(size=(8, 2)).astype("float32")
    members = compiled({})
    members.update(np.arange(8))
    before = members.act(x)
    members.save(tmp_path / "members.keras")
    again = keras.saving.load_model(tmp_path / "members.keras")
    np.testing.assert_allclose(again.act(x), before, atol=1e-6)
    for fitness in (np.arange(8), RNG.normal(size=8)):
        for one in (members, again):
            one.update(fitness)
        np.testing.assert_allclose(again.act(x), members.act(x), atol=1e-6)
    np.testing.assert_array_equal(members.act(x), members.act(x))  # Until `update`.
    assert np.abs(members.act(x) - before).min() > 0


def test_seeds():
    x = RNG.normal(size=(8, 2)).astype("float32")
    first, same, other = (
        classifier(population=8, seed=seed).act(x) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).min() > 0


def test_penalties_have_their_own_gradient():
    body = layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.1))
    members = strategy(keras.Sequential([keras.Input((3,)), body]), population=8)
    members.compile(keras.optimizers.SGD(0.5), lambda y, p: 0 * p[:, 0])
    kernel = value(body.kernel)
    loss = members.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))
    assert loss == pytest.approx(0.1 * (kernel**2).sum(), rel=1e-5)
    np.testing.assert_allclose(value(body.kernel), kernel * (1 - 0.1), atol=1e-6)
    members.update(np.zeros(8))
    np.testing.assert_allclose(value(body.kernel), kernel * 0.9**2, atol=1e-6)


def test_layers_of_several_inputs_and_masks():
    x = keras.Input((3, 2), name="x")
    masked = layers.Masking()(x)
    both = layers.Concatenate()([masked, layers.Dense(2)(x)])
    mean = layers.GlobalAveragePooling1D()(layers.Add()([both, both]))
    members = strategy(keras.Model(x, layers.Dense(2)(mean)), population=4)
    rows = RNG.normal(size=(4, 3, 2)).astype("float32")
    rows[:, 2] = 0
    found, model = members.act(rows), members.model
    kept = model.get_weights()
    for n in range(4):
        set_weights(model, members.member_weights(n))
        alone = model.predict(rows[n : n + 1], verbose=0)
        np.testing.assert_allclose(found[n : n + 1], alone, rtol=1e-4, atol=1e-5)
        model.set_weights(kept)


def test_weights_of_examples_count():
    x, y = RNG.normal(size=(4, 3)), RNG.normal(size=(4, 2))
    steps = []
    for keep in (2, 4):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
        members = strategy(model, population=8, shaping=None)
        members.compile(keras.optimizers.SGD(1.0), "mse")
        # Rows of weight 0 halve the mean, as they do in any model.
        weight = np.array([1, 1, 0, 0])[:keep] * (keep / 2)
        members.train_on_batch(x[:keep], y[:keep], sample_weight=weight)
        steps.append(value(model.trainable_variables[0]))
    np.testing.assert_allclose(*steps, rtol=1e-5, atol=1e-5)


def test_mixed_precision():
    x, y = blobs()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        members = compiled({})
    finally:
        keras.config.set_dtype_policy("float32")
    members.fit(x, y, batch_size=45, verbose=0)
    before = [value(v) for v in members.trainable_variables]
    keras.config.set_dtype_policy("mixed_float16")
    try:
        members.update(1e5 + np.arange(8))  # All infinite in half precision.
    finally:
        keras.config.set_dtype_policy("float32")
    for v, b in zip(members.trainable_variables, before, strict=True):
        assert v.dtype == "float32" and np.isfinite(value(v)).all()
        assert np.abs(value(v) - b).max() > 1e-4


def test_frozen_layers_and_statistics_stay():
    norm, frozen = layers.BatchNormalization(), layers.Dense(4)
    norm.trainable = frozen.trainable = False
    model = keras.Sequential([keras.Input((3,)), norm, frozen, layers.Dense(2)])
    members = strategy(model, population=8)
    members.compile("sgd", "mse")
    before = [value(v) for v in (*norm.weights, *frozen.weights)]
    members.fit(RNG.normal(size=(8, 3)), RNG.normal(size=(8, 2)), verbose=0)
    for v, b in zip((*norm.weights, *frozen.weights), before, strict=True):
        np.testing.assert_array_equal(value(v), b)
    assert len(members.trainable_variables) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"population": 1}, "at least 2. Received: population=1"),
        ({"population": 7}, "in pairs. Received: population=7"),
        ({"population": 8, "bases": 3}, "`bases`.*bases=3"),
        ({"bases": 0}, "at least 1. Received: bases=0"),
        ({"stddev": 0.0}, "above 0. Received: stddev=0.0"),
        ({"stddev": "1"}, "above 0. Received: stddev='1'"),
        ({"stddev": float("nan")}, "above 0. Received: stddev=nan"),
        ({"shaping": "ranks"}, "'centered_ranks'.*Received: shaping='ranks'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        strategy(dense(), **{"population": 8, **arguments})


def test_models_it_cannot_perturb_are_refused():
    norm = [keras.Input((3,)), layers.Dense(2), layers.BatchNormalization()]
    with pytest.raises(ValueError, match="dense, einsum.*Received: .*gamma"):
        strategy(keras.Sequential(norm))
    with pytest.raises(ValueError, match="built.*Received: Sequential"):
        strategy(keras.Sequential([layers.Dense(2)]))
    with pytest.raises(ValueError, match="Received: model .* with none"):
        strategy(keras.Sequential([keras.Input((3,)), layers.Flatten()]))
    penalty = layers.Dense(2, activity_regularizer="l2", name="penalty")
    with pytest.raises(ValueError, match="activity.*Received: one of 'penalty'"):
        strategy(keras.Sequential([keras.Input((3,)), penalty]))
    half = layers.Dense(2, name="half")
    model = keras.Sequential([keras.Input((3,)), half])
    half.kernel.trainable = False
    with pytest.raises(ValueError, match="both or none. Received: 'half', .* bias"):
        strategy(model)


def test_what_does_not_fit_the_population_is_refused():
    members = compiled({})
    with pytest.raises(ValueError, match="multiple of 8.*Received: \\[9\\] rows"):
        members.act(np.zeros((9, 2)))
    with pytest.raises(ValueError, match="multiple of 8.*Received: \\[\\] rows"):
        members.act([[0.0] * 2] * 8)
    for fitness in (np.zeros(7), np.zeros((8, 1)), np.full(8, np.nan)):
        with pytest.raises(ValueError, match="8 finite numbers.*Received"):
            members.update(fitness)
    with pytest.raises(ValueError, match="below 8. Received: n=8"):
        members.member_weights(8)
    with pytest.raises(ValueError, match="before `update`. Received: no optimizer"):
        classifier(population=8).update(np.zeros(8))
    for loss in (None, ["mse"]):
        members = classifier(population=8)
        members.compile("sgd", loss)
        with pytest.raises(ValueError, match="loss"):
            members.fit(np.zeros((2, 2)), np.zeros((2, 3)), verbose=0)


# In a process, for devices come first in one. Two devices make the steps of one that
# has as many bases.
DEVICES = """
import contextlib, os, sys
import numpy as np
import keras
BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
from kzoo.zoo import EvolutionStrategies

def run(shaping, bases=None):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(5, "tanh"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    members = EvolutionStrategies(
        model, 8, 0.3, shaping=shaping, bases=bases, seed=1
    )
    members.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return members

def results(members):
    numbers = np.random.default_rng(0)
    x = numbers.normal(size=(16, 3)).astype("float32")
    found = [members.act(x)]
    for _ in range(2):
        members.update(np.asarray(members.act(x)).reshape(8, -1).mean(1))
    found += [v.numpy() for v in members.trainable_variables]
    # Both halves of a batch are the same: each device has the same loss.
    y = numbers.normal(size=(4, 2)).astype("float32")
    x, y = np.concatenate([x[:4]] * 2), np.concatenate([y] * 2)
    members.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return found + [v.numpy() for v in members.trainable_variables]

SHAPINGS = (None, "centered_ranks")
expected = [results(run(shaping, bases=2)) for shaping in SHAPINGS]
if BACKEND == "tensorflow":
    strategy = tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"])
    scope = strategy.scope
else:
    devices = keras.distribution.list_devices()
    assert len(devices) == 2, devices
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    scope = contextlib.nullcontext
for shaping, of_one in zip(SHAPINGS, expected, strict=True):
    with scope():
        members = run(shaping)
    assert members._count == 2
    for received, e in zip(results(members), of_one, strict=True):
        np.testing.assert_allclose(received, e, 1e-4, 1e-5)
print("done")
"""


@pytest.mark.slow
def test_two_devices_have_a_base_each_and_step_as_one_with_two():
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=2"
    ran = subprocess.run(
        [sys.executable, "-c", DEVICES],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout == "done\n", ran.stdout


def test_a_loss_of_the_whole_batch_is_refused():
    members = strategy(keras.Sequential([keras.Input((3,)), layers.Dense(2)]))
    members.compile("sgd", lambda y, p: keras.ops.mean((y - p) ** 2))
    with pytest.raises(ValueError, match="a value for each row.*a scalar"):
        members.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)


@pytest.mark.tensorflow
def test_fits_under_float64():
    keras.config.set_dtype_policy("float64")
    try:
        body = layers.Dense(2)
        members = strategy(keras.Sequential([keras.Input((3,)), body]), population=8)
        before = value(body.kernel)
        members.compile("sgd", "mse")
        members.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert body.kernel.dtype == "float64" and (value(body.kernel) != before).all()
