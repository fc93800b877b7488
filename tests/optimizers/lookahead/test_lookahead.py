"""Lookahead's values: its identities, trajectories by hand, and what it wraps."""

import keras
import numpy as np
import pytest
from keras import optimizers

from harness import check_optimizer
from kzoo.optimizers import Lookahead

INNER_STATES = ("maintain", "reset", "pullback")

# Every optimizer of Keras, with the arguments that give it all of its slots.
INNER = {
    "sgd": lambda **kwargs: optimizers.SGD(0.05, **kwargs),
    "momentum": lambda **kwargs: optimizers.SGD(0.05, momentum=0.9, **kwargs),
    "nesterov": lambda **kwargs: optimizers.SGD(
        0.05, momentum=0.9, nesterov=True, **kwargs
    ),
    "rmsprop": lambda **kwargs: optimizers.RMSprop(
        0.05, momentum=0.9, centered=True, **kwargs
    ),
    "adam": lambda **kwargs: optimizers.Adam(0.05, amsgrad=True, **kwargs),
    "adamw": lambda **kwargs: optimizers.AdamW(0.05, **kwargs),
    "adagrad": lambda **kwargs: optimizers.Adagrad(0.05, **kwargs),
    "adadelta": lambda **kwargs: optimizers.Adadelta(0.05, **kwargs),
    "adamax": lambda **kwargs: optimizers.Adamax(0.05, **kwargs),
    "nadam": lambda **kwargs: optimizers.Nadam(0.05, **kwargs),
    "ftrl": lambda **kwargs: optimizers.Ftrl(0.05, **kwargs),
    "lion": lambda **kwargs: optimizers.Lion(0.05, **kwargs),
    "adafactor": lambda **kwargs: optimizers.Adafactor(0.05, **kwargs),
    "lamb": lambda **kwargs: optimizers.Lamb(0.05, **kwargs),
    "muon": lambda **kwargs: optimizers.Muon(0.05, **kwargs),
    "schedule_free": lambda **kwargs: optimizers.ScheduleFreeAdamW(0.05, **kwargs),
}

WEIGHTS = (
    np.array([[1.0, -2.0, 0.5], [0.3, 3.0, -0.7]], "float32"),
    np.array([0.1, -0.4, 0.9], "float32"),
)


def gradients(count, seed=0):
    numbers = np.random.default_rng(seed)
    return [
        [numbers.normal(size=w.shape).astype("float32") for w in WEIGHTS]
        for _ in range(count)
    ]


def new_variables(**kwargs):
    return [
        keras.Variable(w, name=name, **kwargs)
        for w, name in zip(WEIGHTS, ("kernel", "bias"), strict=True)
    ]


def run(optimizer, steps, variables=None):
    """Applies gradients; returns the variables' values after each step."""
    variables = variables or new_variables()
    values = []
    for pair in steps:
        tensors = [
            keras.ops.convert_to_tensor(g, keras.backend.standardize_dtype(v.dtype))
            for g, v in zip(pair, variables, strict=True)
        ]
        optimizer.apply(tensors, variables)
        values.append([v.numpy().copy() for v in variables])
    return values


def close(received, expected, tol=1e-6):
    received, expected = (
        [np.concatenate([np.ravel(v) for v in step]) for step in steps]
        for steps in (received, expected)
    )
    np.testing.assert_allclose(received, expected, rtol=tol, atol=tol)


def slow(optimizer):
    return [v.numpy().copy() for v in optimizer.slow_variables]


def by_name(optimizer, ending):
    return [v.numpy() for v in optimizer.variables if v.path.endswith(ending)]


def pytest_generate_tests(metafunc):
    if metafunc.function is test_contract:
        # The one with the most state, unless all are asked for: the others have tests
        # of their own below.
        full = metafunc.config.option.all
        metafunc.parametrize("inner_state", INNER_STATES if full else ["pullback"])


@pytest.mark.slow
def test_contract(inner_state):
    check_optimizer(
        lambda: Lookahead(
            optimizers.Adam(0.05), 3, 0.6, name="ahead", inner_state=inner_state
        )
    )


# The identities.


@pytest.mark.parametrize("name", INNER)
def test_alpha_one_is_the_inner_optimizer(name):
    steps = gradients(7)
    close(run(Lookahead(INNER[name](), 3, 1.0), steps), run(INNER[name](), steps), 0)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("inner_state", INNER_STATES)
def test_alpha_zero_never_moves_the_slow_weights(name, inner_state):
    optimizer = Lookahead(INNER[name](), 2, 0.0, inner_state=inner_state)
    values = run(optimizer, gradients(4))
    close([slow(optimizer)], [WEIGHTS], 0)
    close(values[1::2], [WEIGHTS] * 2, 0)
    assert np.abs(values[2][0] - WEIGHTS[0]).max() > 1e-5


@pytest.mark.parametrize("alpha", [0.3, 0.8])
def test_period_one_with_sgd_is_sgd_with_a_smaller_rate(alpha):
    steps = gradients(6)
    close(
        run(Lookahead(optimizers.SGD(0.1), 1, alpha), steps),
        run(optimizers.SGD(0.1 * alpha), steps),
    )


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("inner_state", INNER_STATES)
def test_fast_and_slow_weights_are_equal_after_a_sync_alone(name, inner_state):
    optimizer = Lookahead(INNER[name](), 3, inner_state=inner_state)
    variables = new_variables()
    for step, pair in enumerate(gradients(9), start=1):
        values = run(optimizer, [pair], variables)
        difference = np.abs(values[0][0] - slow(optimizer)[0]).max()
        assert difference == 0 if step % 3 == 0 else difference > 1e-5, step


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(INNER) - {"schedule_free"}))
@pytest.mark.parametrize("k", [1, 3])
def test_every_cycle_is_a_run_of_a_new_inner_optimizer_after_a_reset(name, k):
    """φ_t from the inner optimizer alone: k steps of a fresh one from φ_{t-1}."""
    alpha, cycles = 0.6, 3
    steps, phi, expected = gradients(cycles * k), WEIGHTS, []
    for t in range(cycles):
        variables = [
            keras.Variable(w, name=n)
            for w, n in zip(phi, ("kernel", "bias"), strict=True)
        ]
        theta = run(INNER[name](), steps[t * k : (t + 1) * k], variables)
        phi = [p + alpha * (w - p) for p, w in zip(phi, theta[-1], strict=True)]
        expected += [*theta[:-1], phi]
    optimizer = Lookahead(INNER[name](), k, alpha, inner_state="reset")
    close(run(optimizer, steps), expected, 1e-5)


def test_a_reset_restarts_schedule_free_from_the_slow_weights():
    optimizer = Lookahead(INNER["schedule_free"](), 2, inner_state="reset")
    run(optimizer, gradients(2))
    close([by_name(optimizer, "_momentum")], [slow(optimizer)], 0)
    expected = [keras.Variable(w) for w in slow(optimizer)]
    new = gradients(1, seed=1)
    close(
        run(optimizer, new, optimizer._trainable_variables),
        run(INNER["schedule_free"](), new, expected),
        1e-5,
    )


# Trajectories.


def test_trajectories_by_hand():
    """One weight, gradient 1: m ← m/2 - 0.1, θ ← θ + m; k = 2, α = 1/2."""
    expected = {
        # θ: 0.9, 0.75 -> φ = 1 + (0.75 - 1)/2 = 0.875, m = -0.15
        "maintain": [0.9, 0.875, 0.875 - 0.175, (0.5125 + 0.875) / 2],
        # m = 0: as the first two steps
        "reset": [0.9, 0.875, 0.875 - 0.1, (0.625 + 0.875) / 2],
        # m = -0.15/2 + 0/2 = -0.075: then -0.1375, -0.16875
        "pullback": [0.9, 0.875, 0.875 - 0.1375, (0.56875 + 0.875) / 2],
    }
    momentum = {"maintain": -0.1875, "reset": 0.0}
    momentum["pullback"] = (-0.16875 - 0.075) / 2
    for inner_state, theta in expected.items():
        inner = optimizers.SGD(0.1, momentum=0.5)
        optimizer = Lookahead(inner, 2, inner_state=inner_state)
        values = run(optimizer, [[np.ones(1)]] * 4, [keras.Variable([1.0])])
        np.testing.assert_allclose(np.ravel(values), theta, atol=1e-6)
        found = by_name(optimizer, "_momentum")
        np.testing.assert_allclose(np.ravel(found), momentum[inner_state], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 0.8])
@pytest.mark.parametrize("inner_state", INNER_STATES)
def test_momentum_in_numpy(inner_state, alpha):
    k, gamma, mu, steps = 3, 0.05, 0.9, gradients(11)
    theta = [w.astype("float64") for w in WEIGHTS]
    phi, m, m_sync = theta, [0, 0], [0, 0]
    expected = []
    for update, pair in enumerate(steps):
        m = [mu * mi - gamma * g for mi, g in zip(m, pair, strict=True)]
        theta = [t + mi for t, mi in zip(theta, m, strict=True)]
        if (update + 1) % k == 0:
            phi = [p + alpha * (t - p) for p, t in zip(phi, theta, strict=True)]
            theta = phi
            if inner_state == "reset":
                m = [0, 0]
            if inner_state == "pullback":
                m = [
                    alpha * mi + (1 - alpha) * si
                    for mi, si in zip(m, m_sync, strict=True)
                ]
            m_sync = m
        expected.append(theta)
    optimizer = Lookahead(INNER["momentum"](), k, alpha, inner_state=inner_state)
    close(run(optimizer, steps), expected)
    close([slow(optimizer)], [phi])


@pytest.mark.parametrize("inner_state", INNER_STATES)
def test_adam_in_numpy(inner_state):
    """With a reset, the correction of bias begins anew as well."""
    k, alpha, gamma, b1, b2, eps = 3, 0.5, 0.05, 0.9, 0.999, 1e-7
    steps = gradients(8)
    theta = phi = WEIGHTS[0].astype("float64")
    m = v = m_sync = np.zeros_like(theta)
    t, expected = 0, []
    for update, (g, _) in enumerate(steps):
        t += 1
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        rate = gamma * np.sqrt(1 - b2**t) / (1 - b1**t)
        theta = theta - rate * m / (np.sqrt(v) + eps)
        if (update + 1) % k == 0:
            theta = phi = phi + alpha * (theta - phi)
            if inner_state == "reset":
                m, v, t = 0 * m, 0 * v, 0
            if inner_state == "pullback":
                m = m_sync = alpha * m + (1 - alpha) * m_sync
        expected.append([theta])
    optimizer = Lookahead(optimizers.Adam(gamma), k, alpha, inner_state=inner_state)
    close([step[:1] for step in run(optimizer, steps)], expected, 1e-5)
    assert int(optimizer.iterations) == 8


MOMENTA = {
    "momentum": ["momentum"],
    "nesterov": ["momentum"],
    "rmsprop": ["momentum"],
    "adam": ["momentum"],
    "adamw": ["momentum"],
    "adamax": ["momentum"],
    "nadam": ["momentum"],
    "ftrl": ["linear"],
    "lion": ["momentum"],
    "lamb": ["momentum"],
    "muon": ["momentum"],
    "schedule_free": ["momentum"],
}


@pytest.mark.parametrize("name", INNER)
def test_pullback_interpolates_the_momenta_and_nothing_else(name):
    alpha, steps, kinds = 0.3, gradients(2), MOMENTA.get(name, ())
    unused, inner = INNER[name](), INNER[name]()
    unused.build(new_variables())
    run(inner, steps)
    optimizer = Lookahead(INNER[name](), 2, alpha, inner_state="pullback")
    run(optimizer, steps)
    pulled = 0
    for variable, before, start in zip(
        optimizer.inner_optimizer.variables,
        inner.variables,
        unused.variables,
        strict=True,
    ):
        expected = before.numpy()
        if variable.path.endswith(tuple(f"_{kind}" for kind in kinds)):
            expected = alpha * expected + (1 - alpha) * start.numpy()
            pulled += 1
        np.testing.assert_allclose(
            variable.numpy(), expected, 1e-5, 1e-7, err_msg=variable.path
        )
    assert pulled == 2 * len(kinds)


def test_a_reset_restores_the_first_values_of_all_slots():
    optimizer = Lookahead(optimizers.Adagrad(0.1, 0.25), 2, inner_state="reset")
    run(optimizer, gradients(2))
    close(
        [by_name(optimizer, "_accumulator")],
        [[np.full(w.shape, 0.25) for w in WEIGHTS]],
    )

    optimizer = Lookahead(INNER["nadam"](), 2, inner_state="reset")
    run(optimizer, gradients(2))
    product = optimizer.inner_optimizer._u_product.numpy()
    assert product == 1.0


@pytest.mark.parametrize("alpha, k", [(0.5, 5), (0.8, 5), (0.3, 2)])
def test_variance_on_the_noisy_quadratic(alpha, k):
    """θ of many chains; gradient a(θ - c), c ~ N(0, σ²), after the sync."""
    gamma, a, sigma, chains, cycles = 0.5, 1.0, 1.0, 100_000, 60 // k + 8
    q = 1 - gamma * a
    v_sgd = gamma**2 * a**2 * sigma**2 / (1 - q**2)
    numerator = alpha**2 * (1 - q ** (2 * k))
    theory = v_sgd * numerator / (numerator + 2 * alpha * (1 - alpha) * (1 - q**k))
    if (alpha, k) == (0.5, 5):
        np.testing.assert_allclose([v_sgd, theory], [0.3333, 0.1134], atol=1e-4)

    numbers = np.random.default_rng(0)
    theta = keras.Variable(np.zeros(chains, "float32"))
    optimizer = Lookahead(optimizers.SGD(gamma), k, alpha)
    for _ in range(cycles * k):
        c = numbers.normal(scale=sigma, size=chains).astype("float32")
        optimizer.apply([a * (theta.value - c)], [theta])
    # The standard deviation of the sample variance is v √(2/n): 4 of them.
    received = theta.numpy().var()
    np.testing.assert_allclose(received, theory, rtol=4 * np.sqrt(2 / chains))
    np.testing.assert_allclose(theta.numpy(), slow(optimizer)[0])


# Slow weights.


def test_slow_weights_start_from_the_variables():
    variables = new_variables()
    optimizer = Lookahead(optimizers.SGD(0.1))
    optimizer.build(variables)
    close([slow(optimizer)], [WEIGHTS], 0)


def test_slow_weights_start_from_what_is_loaded_before_the_first_update():
    """A model that is compiled and saved before training has no slow weights yet."""
    variables = new_variables()
    optimizer = Lookahead(optimizers.SGD(0.1), 2, 0.5)
    optimizer.build(variables)
    for variable in variables:
        variable.assign(variable + 100.0)
    values = run(optimizer, [[np.ones(w.shape) for w in WEIGHTS]] * 2, variables)
    close(values[1:], [[w + 100.0 - 0.1 for w in WEIGHTS]], 1e-5)


def test_slow_weights_are_float32_for_half_precision():
    theta = keras.Variable([1.0], dtype="bfloat16")
    inner = optimizers.SGD(2.0**-8, momentum=0.5, gradient_accumulation_steps=2)
    optimizer = Lookahead(inner, 2, 0.5, inner_state="pullback")
    # In bfloat16, 1 - 2⁻⁸ and 1 - 2⁻⁷ are numbers, and what is halfway is not.
    for gradient in (1.0, 1.0, -0.5, -0.5):
        run(optimizer, [[np.full(1, gradient)]], [theta])
    for _ in range(2):
        assert slow(optimizer)[0].dtype == np.float32
        np.testing.assert_equal(slow(optimizer)[0], [1 - 2.0**-9])
        np.testing.assert_equal(keras.ops.convert_to_numpy(theta), [1.0])
        # What is only accumulated is no update, and brings no sync.
        run(optimizer, [[np.ones(1)]], [theta])


def test_a_constraint_holds_for_the_slow_weights():
    unit = keras.constraints.UnitNorm(axis=0)
    theta = keras.Variable([1.0, 0.0], name="w")
    theta.constraint = unit
    optimizer = Lookahead(optimizers.SGD(1.0), 1, 0.5)
    run(optimizer, [[np.array([1.0, -1.0])]], [theta])
    # The step ends at (0, 1); halfway from (1, 0) is (1/2, 1/2).
    np.testing.assert_allclose(theta.numpy(), np.full(2, 0.5**0.5), atol=1e-6)
    np.testing.assert_allclose(slow(optimizer)[0], theta.numpy(), atol=1e-6)


def test_variables_that_their_gradient_overwrites_are_not_averaged():
    theta, scale = keras.Variable([1.0]), keras.Variable([5.0])
    scale.overwrite_with_gradient = True
    optimizer = Lookahead(optimizers.Adam(0.1), 2)
    run(optimizer, [[np.ones(1), np.full(1, 7.0)]] * 2, [theta, scale])
    assert scale.numpy() == 7.0
    assert optimizer.slow_variables[1] is None
    assert len(by_name(optimizer, "_slow")) == 1


# What it wraps.


def test_the_inner_optimizer_by_name_config_and_instance():
    config = optimizers.serialize(optimizers.Adam(0.5))
    before = repr(config)
    for given, rate in (("adam", 0.001), (config, 0.5), (optimizers.Adam(0.5), 0.5)):
        optimizer = Lookahead(given)
        assert isinstance(optimizer.inner_optimizer, optimizers.Adam)
        assert float(optimizer.learning_rate) == pytest.approx(rate)
    assert repr(config) == before


@pytest.mark.parametrize(
    "kwargs",
    [
        {"weight_decay": 0.1},
        {"clipnorm": 0.5},
        {"global_clipnorm": 0.5},
        {"clipvalue": 0.1},
        {"use_ema": True, "ema_momentum": 0.5},
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    ],
    ids=str,
)
def test_arguments_of_the_inner_optimizer(kwargs):
    """Within a cycle all is as without Lookahead."""
    steps = gradients(4)
    optimizer, inner = Lookahead(INNER["adam"](**kwargs), 5), INNER["adam"](**kwargs)
    close(run(optimizer, steps), run(inner, steps))
    variables = optimizer._trainable_variables
    optimizer.finalize_variable_values(variables)
    inner.finalize_variable_values(inner._trainable_variables)
    close(
        [[v.numpy() for v in variables]],
        [[v.numpy() for v in inner._trainable_variables]],
    )


def test_the_moving_average_goes_on_through_a_reset():
    """It is of the fast weights, which α = 1/2 gives back: θ = 2 φ_t - φ_{t-1}."""
    steps = gradients(5)
    values = run(Lookahead(INNER["adam"](), 2, inner_state="reset"), steps)
    phi = [WEIGHTS[0], values[1][0], values[3][0]]
    theta = [value[0] for value in values]
    theta[1], theta[3] = 2 * phi[1] - phi[0], 2 * phi[2] - phi[1]
    average = theta[0]
    for value in theta[1:]:
        average = 0.5 * average + 0.5 * value

    inner = INNER["adam"](use_ema=True, ema_momentum=0.5)
    optimizer = Lookahead(inner, 2, inner_state="reset")
    close(run(optimizer, steps), values)
    np.testing.assert_allclose(by_name(optimizer, "_average")[0], average, 1e-5, 1e-6)


def test_weight_decay_exclusion_reaches_the_inner_optimizer():
    steps = [[np.zeros(w.shape, "float32") for w in WEIGHTS]] * 2
    for inner in (
        optimizers.AdamW(0.1, weight_decay=0.5),
        optimizers.LossScaleOptimizer(optimizers.AdamW(0.1, weight_decay=0.5)),
    ):
        optimizer = Lookahead(inner, 2, 1.0)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        kernel, bias = run(optimizer, steps)[-1]
        np.testing.assert_allclose(kernel, WEIGHTS[0] * (1 - 0.05) ** 2, 1e-5)
        np.testing.assert_array_equal(bias, WEIGHTS[1])


@pytest.mark.parametrize("inner_state", INNER_STATES)
def test_accumulated_gradients_count_once(inner_state):
    pairs = gradients(7)
    halves = [[g * part for g in pair] for pair in pairs for part in (0.5, 1.5)]
    accumulating = INNER["adam"](gradient_accumulation_steps=2)
    optimizer = Lookahead(accumulating, 3, inner_state=inner_state)
    received = run(optimizer, halves)
    expected = run(Lookahead(INNER["adam"](), 3, inner_state=inner_state), pairs)
    close(received[1::2], expected)
    close(received[2::2], received[1:-1:2], 0)
    assert int(optimizer.iterations) == 7


def scaled(pairs, scale):
    return [[g * np.float32(scale) for g in pair] for pair in pairs]


@pytest.mark.parametrize("inner_state", INNER_STATES)
def test_steps_that_a_loss_scale_below_skips_do_not_count(inner_state):
    pairs = gradients(5)
    inner = optimizers.LossScaleOptimizer(INNER["adam"](), initial_scale=8.0)
    optimizer = Lookahead(inner, 2, inner_state=inner_state)
    given = scaled(pairs[:3], 8.0) + scaled(pairs[:1], np.inf) + scaled(pairs[3:], 4.0)
    received = run(optimizer, given)
    expected = run(Lookahead(INNER["adam"](), 2, inner_state=inner_state), pairs)
    close(received[:3] + received[4:], expected)
    close(received[3:4], received[2:3], 0)
    assert int(optimizer.iterations) == 5
    assert float(optimizer.scale_loss(1.0)) == 4.0


@pytest.mark.slow
@pytest.mark.parametrize("where", ["above", "below"])
def test_infinite_gradients_in_training(where, inner_state="pullback"):
    """A batch that overflows changes neither weights nor what is to come."""
    x, y = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")

    def train(infinite):
        model = new_model()
        inner, scale = INNER["momentum"](), optimizers.LossScaleOptimizer
        if where == "below":
            optimizer = Lookahead(scale(inner), 3, inner_state=inner_state)
        else:
            optimizer = scale(Lookahead(inner, 3, inner_state=inner_state))
        model.compile(optimizer, loss="mse")
        for step in range(7):
            if step == 2 and infinite:
                before = model.get_weights()
                model.train_on_batch(x * np.inf, y)
                close([model.get_weights()], [before], 0)
            model.train_on_batch(x * (1 + step), y)
        return model.get_weights()

    close([train(True)], [train(False)])


def new_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh", name="first"),
            keras.layers.Dense(2, name="second"),
        ]
    )


def batches(count):
    numbers = np.random.default_rng(0)
    return [
        (
            numbers.normal(size=(6, 3)).astype("float32"),
            numbers.normal(size=(6, 2)).astype("float32"),
        )
        for _ in range(count)
    ]


@pytest.fixture
def float16():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


def test_keras_puts_a_loss_scale_around_it_under_mixed_float16(float16):
    model = new_model()
    model.compile(Lookahead(INNER["adam"](), 3), loss="mse")
    assert isinstance(model.optimizer, optimizers.LossScaleOptimizer)
    model.train_on_batch(*batches(1)[0])
    assert {v.dtype for v in model.optimizer.variables if "slow" in v.path} == {
        "float32"
    }


def test_two_loss_scales_are_refused(float16):
    model = new_model()
    inner = optimizers.LossScaleOptimizer(INNER["adam"]())
    with pytest.raises(ValueError, match="one loss scale.*Received"):
        model.compile(Lookahead(inner), loss="mse")
    model.compile(Lookahead(inner), loss="mse", auto_scale_loss=False)
    model.train_on_batch(*batches(1)[0])


def test_a_loss_scale_above_takes_the_inner_factor_away():
    optimizer = Lookahead(optimizers.SGD(1.0, loss_scale_factor=8.0), 2, 1.0)
    assert float(optimizer.scale_loss(1.0)) == 8.0
    assert optimizer.loss_scale_factor == 8.0
    assert run(optimizer, [[np.full(1, 8.0)]], [keras.Variable([1.0])])[0] == [0.0]
    optimizers.LossScaleOptimizer(optimizer)
    assert optimizer.loss_scale_factor is None


def test_learning_rate_and_schedules_pass_through():
    optimizer = Lookahead(optimizers.SGD(0.1), 2, inner_state="reset")
    optimizer.learning_rate = 0.25
    assert float(optimizer.inner_optimizer.learning_rate) == 0.25
    # One variable of it, the inner optimizer's.
    assert len([v for v in optimizer.variables if "learning_rate" in v.path]) == 1

    rates = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625]
    schedule = optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    for inner_state in INNER_STATES:
        optimizer = Lookahead(optimizers.SGD(schedule), 2, 1.0, inner_state=inner_state)
        theta = keras.Variable([0.0])
        for step, rate in enumerate(rates, start=1):
            run(optimizer, [[-np.ones(1)]], [theta])
            assert float(theta.numpy()[0]) == pytest.approx(sum(rates[:step]))
            assert float(optimizer.learning_rate) == pytest.approx(rate / 2)
        with pytest.raises(TypeError):
            optimizer.learning_rate = 0.1


def test_callbacks_of_the_learning_rate():
    model = new_model()
    model.compile(Lookahead(optimizers.SGD(0.1)), loss="mse")
    x, y = batches(1)[0]
    seen = []
    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
        keras.callbacks.ReduceLROnPlateau("loss", 0.1, 1, min_delta=1e9, verbose=0),
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: seen.append(logs["learning_rate"])
        ),
    ]
    model.fit(x, y, epochs=3, callbacks=callbacks, verbose=0)
    np.testing.assert_allclose(seen, [0.05, 0.025, 0.00125], rtol=1e-5)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.000125)


@pytest.mark.parametrize("inner_state", INNER_STATES)
def test_each_part_of_a_multi_optimizer_is_as_alone(inner_state):
    def parts():
        return INNER["adam"](), INNER["momentum"]()

    kernel, bias = parts()
    both = optimizers.MultiOptimizer(
        optimizers.OptimizerMap(bias, {"kernel": kernel}), name="both"
    )
    steps = gradients(7)
    received = run(Lookahead(both, 3, inner_state=inner_state), steps)
    for i, part in enumerate(parts()):
        alone = Lookahead(part, 3, inner_state=inner_state)
        expected = run(alone, [[pair[i]] for pair in steps], [new_variables()[i]])
        close([[step[i]] for step in received], expected)

    kernel, bias = parts()
    within = optimizers.MultiOptimizer(
        optimizers.OptimizerMap(
            bias, {"kernel": Lookahead(kernel, 3, inner_state=inner_state)}
        )
    )
    close([step[:1] for step in run(within, steps)], [s[:1] for s in received])


@pytest.mark.parametrize("outer", INNER_STATES)
@pytest.mark.parametrize("inner", INNER_STATES)
def test_lookahead_around_lookahead(inner, outer):
    """Two levels in NumPy: the inner one restarts from the outer sync's weights."""
    gamma, mu, k, alphas = 0.05, 0.9, (2, 4), (0.5, 0.25)
    theta = WEIGHTS[0].astype("float64")
    phi, m, m_sync = [theta, theta], np.zeros_like(theta), np.zeros((2, 2, 3))
    steps, expected = gradients(10), []
    for update, (g, _) in enumerate(steps, start=1):
        m = mu * m - gamma * g
        theta = theta + m
        for level, state in ((0, inner), (1, outer)):
            if update % k[level]:
                continue
            alpha = alphas[level]
            theta = phi[level] + alpha * (theta - phi[level])
            phi[: level + 1] = [theta] * (level + 1)
            if state == "reset":
                m = 0 * m
                m_sync[:level] = 0
            if state == "pullback":
                m = alpha * m + (1 - alpha) * m_sync[level]
                m_sync[: level + 1] = m
        expected.append([theta])
    optimizer = Lookahead(
        Lookahead(INNER["momentum"](), k[0], alphas[0], inner_state=inner),
        k[1],
        alphas[1],
        inner_state=outer,
    )
    close([step[:1] for step in run(optimizer, steps)], expected)


def test_bias_correction_counts_from_the_last_of_two_resets():
    steps = gradients(7)
    inner = Lookahead(INNER["adam"](), 2, 1.0, inner_state="reset")
    received = run(Lookahead(inner, 3, 1.0, inner_state="reset"), steps)
    expected, values = [], WEIGHTS
    for start, stop in ((0, 2), (2, 3), (3, 4), (4, 6), (6, 7)):
        variables = [keras.Variable(v) for v in values]
        expected += run(INNER["adam"](), steps[start:stop], variables)
        values = expected[-1]
    close(received, expected)


def test_an_optimizer_that_has_been_used_goes_on():
    steps = gradients(7)
    inner, variables = INNER["adam"](), new_variables()
    run(inner, steps[:3], variables)
    received = run(Lookahead(inner, 4, 1.0), steps[3:], variables)
    close(received, run(INNER["adam"](), steps)[3:])
    with pytest.raises(ValueError, match="not built yet.*Received"):
        run(Lookahead(inner, inner_state="reset"), steps, variables)


# Keras's ways to call it.


def test_apply_as_the_base_optimizer_does():
    (kernel, bias), pair = new_variables(), gradients(1)[0]
    tensors = [keras.ops.convert_to_tensor(g) for g in pair]
    optimizer = Lookahead(optimizers.SGD(1.0), 2, 0.5)
    assert optimizer.apply([]) is None
    with pytest.raises(ValueError, match="built.*Received: 2 gradients"):
        optimizer.apply(tensors)
    assert not optimizer.built
    optimizer.build([kernel, bias])
    optimizer.apply(tensors)
    close(
        [[kernel.numpy(), bias.numpy()]],
        [[w - g for w, g in zip(WEIGHTS, pair, strict=True)]],
    )
    # A part of the variables, and a gradient that is None: the sync is of all.
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply_gradients([(None, kernel), (tensors[1], bias)])
    expected = [WEIGHTS[0] - pair[0] / 2, WEIGHTS[1] - pair[1]]
    close([[kernel.numpy(), bias.numpy()]], [expected])
    optimizer.apply(tensors[1:], [bias])
    close([[kernel.numpy(), bias.numpy()]], [[expected[0], expected[1] - pair[1]]])
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply(tensors[:1], [keras.Variable(WEIGHTS[0])])
    with pytest.raises(ValueError, match="Received: 1 gradients, 2 variables"):
        optimizer.apply(tensors[:1])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"optimizer": "nonsense"},
        {"optimizer": {"a": 1}},
        {"optimizer": optimizers.Adam},
        {"optimizer": None},
        {"sync_period": 0},
        {"sync_period": 2.0},
        {"sync_period": True},
        {"slow_step_size": -0.1},
        {"slow_step_size": 1.5},
        {"slow_step_size": "half"},
        {"inner_state": "keep"},
        {"clipnorm": 1.0},
    ],
    ids=str,
)
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match="expected.*Received"):
        Lookahead(**{"optimizer": "sgd", **kwargs})


def test_what_a_reset_cannot_restore_is_refused():
    class Odd(optimizers.SGD):
        def build(self, variables):
            super().build(variables)
            self.add_variable((2,), lambda shape, dtype: np.arange(2.0), name="odd")

    with pytest.raises(ValueError, match="one number.*Received.*odd"):
        Lookahead(Odd(), inner_state="reset").build(new_variables())

    parts = optimizers.OptimizerMap(
        optimizers.SGD(gradient_accumulation_steps=2), {"kernel": optimizers.SGD()}
    )
    optimizer = Lookahead(optimizers.MultiOptimizer(parts))
    with pytest.raises(ValueError, match=r"same number of steps.*\[1, 2\]"):
        optimizer.build(new_variables())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, inner_state",
    [
        ("adam", "maintain"),
        ("adagrad", "reset"),
        ("nadam", "reset"),
        ("schedule_free", "reset"),
        ("ftrl", "pullback"),
        ("muon", "pullback"),
    ],
)
def test_compiled_training_equals_eager_training(name, inner_state):
    def train(**mode):
        model = new_model()
        optimizer = Lookahead(INNER[name](), 2, 0.6, inner_state=inner_state)
        model.compile(optimizer, loss="mse", **mode)
        for batch in batches(5):
            model.train_on_batch(*batch)
        return model.get_weights()

    close([train(jit_compile=True)], [train(run_eagerly=True)], 1e-5)


# State.


def test_config():
    optimizer = Lookahead("adam", 3, 0.25, "ahead", "pullback")
    config = optimizer.get_config()
    inner = config.pop("optimizer")
    assert inner["class_name"] == "Adam"
    assert config == {
        "sync_period": 3,
        "slow_step_size": 0.25,
        "name": "ahead",
        "inner_state": "pullback",
    }
    again = optimizers.deserialize(optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()
    assert again.inner_optimizer is not optimizer.inner_optimizer


@pytest.mark.slow
@pytest.mark.parametrize("inner_state", INNER_STATES)
def test_stopping_after_any_step_and_resuming(tmp_path, inner_state):
    data = batches(8)

    def compiled():
        model = new_model()
        inner = optimizers.Adam(
            optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), use_ema=True
        )
        optimizer = Lookahead(inner, 3, 0.6, inner_state=inner_state)
        model.compile(optimizer, loss="mse", run_eagerly=True)
        return model

    model = compiled()
    model.optimizer.build(model.trainable_variables)
    for step, batch in enumerate(data):
        model.save(tmp_path / f"{step}.keras")
        model.train_on_batch(*batch)
    expected = [v.numpy() for v in model.weights + model.optimizer.variables]
    for step in range(len(data)):
        loaded = keras.saving.load_model(tmp_path / f"{step}.keras")
        loaded.run_eagerly = True
        for batch in data[step:]:
            loaded.train_on_batch(*batch)
        received = [v.numpy() for v in loaded.weights + loaded.optimizer.variables]
        close([received], [expected])


@pytest.mark.slow
def test_backup_and_restore_within_a_cycle(tmp_path):
    """Five steps an epoch, a sync every three: stopped after one and two epochs."""
    x, y = (np.concatenate(arrays) for arrays in zip(*batches(5), strict=True))

    class Stop(keras.callbacks.Callback):
        def __init__(self, at):
            super().__init__()
            self.at = at

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == self.at:
                raise InterruptedError

    def fit(*stops):
        for at in (*stops, None):
            model = new_model()
            optimizer = Lookahead(INNER["adam"](), 3, inner_state="pullback")
            model.compile(optimizer, loss="mse")
            backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
            try:
                model.fit(
                    x,
                    y,
                    batch_size=6,
                    epochs=4,
                    shuffle=False,
                    verbose=0,
                    callbacks=[backup, Stop(at)],
                )
            except InterruptedError:
                continue
        return [v.numpy() for v in model.weights + model.optimizer.variables]

    close([fit(1, 2)], [fit()])


def test_set_weights_sets_all_state():
    first, second = (
        Lookahead(INNER["adam"](), 3, inner_state="pullback") for _ in range(2)
    )
    values = run(first, gradients(4))[-1]
    variables = [keras.Variable(v) for v in values]
    with pytest.raises(ValueError, match="built.*Received: built=False"):
        second.set_weights([])
    second.build(variables)
    second.set_weights([v.numpy() for v in first.variables])
    rest = gradients(5, seed=1)
    close(run(second, rest, variables), run(first, rest, first._trainable_variables), 0)
    with pytest.raises(ValueError, match="shapes.*Received"):
        second.set_weights([0.0])


@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_load_weights_restores_an_optimizer_that_is_built(inner, tmp_path):
    """As Keras does with its own: it warns that it skips one that is not."""
    x = np.random.default_rng(0).normal(size=(4, 2)).astype("float32")

    def new(optimizer):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
        model.compile(optimizer, loss="mse")
        return model

    def train(model):
        for _ in range(4):  # Ends within a cycle of 3.
            model.train_on_batch(x, x[:, :1])
        return [v.numpy() for v in (*model.weights, *model.optimizer.variables)]

    def lookahead():
        return Lookahead(INNER[inner](), 3)

    model, file = new(lookahead()), tmp_path / "x.weights.h5"
    train(model)
    model.save_weights(file)
    loaded = new(lookahead())
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(file)
    close([train(loaded)], [train(model)])

    loaded = new(lookahead())
    with pytest.warns(UserWarning, match="Skipping .*'Lookahead'"):
        loaded.load_weights(file)
    assert not loaded.optimizer.built

    model = new(INNER["adam"]())
    train(model)
    model.save_weights(file)
    with pytest.warns(UserWarning, match="Skipping .*'adam"):
        new(INNER["adam"]()).load_weights(file)


@pytest.mark.tensorflow
def test_tensorflow_variables_and_checkpoints(tmp_path):
    import tensorflow as tf

    def new():
        variables = [tf.Variable(w) for w in WEIGHTS]
        optimizer = Lookahead(INNER["momentum"](), 3, inner_state="pullback")
        return variables, optimizer, tf.train.Checkpoint(v=variables, o=optimizer)

    steps = gradients(7)
    variables, optimizer, checkpoint = new()
    expected = run(Lookahead(INNER["momentum"](), 3, inner_state="pullback"), steps)
    close(run(optimizer, steps[:4], variables), expected[:4])
    path = checkpoint.save(tmp_path / "checkpoint")
    variables, optimizer, checkpoint = new()
    optimizer.build(variables)
    checkpoint.restore(path).assert_consumed()
    close(run(optimizer, steps[4:], variables), expected[4:])


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.parametrize("jit", [False, True])
def test_sparse_gradients_and_an_optimizer_built_within_a_function(jit):
    import tensorflow as tf

    table = keras.Variable(np.ones((4, 2)))
    optimizer = Lookahead(optimizers.SGD(0.5), 2, 0.5, inner_state="reset")

    @tf.function(jit_compile=jit)
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table.value, [1, 1, 3]))
        gradient = tape.gradient(loss, table.value)
        assert isinstance(gradient, tf.IndexedSlices)
        optimizer.apply([gradient], [table])

    for _ in range(3):
        step()
    np.testing.assert_allclose(table.numpy()[:, 0], [1, -1, 1, 0])


@pytest.mark.jax
def test_buffers_are_not_shared():
    """JAX donates a step's buffers: one behind two variables could not be."""
    import jax

    variables = new_variables()
    optimizer = Lookahead(INNER["momentum"](), 1, 1.0, inner_state="pullback")
    optimizer.build(variables)
    run(optimizer, gradients(2), variables)
    with optimizer.slow_weights():
        pass
    held = [v.value for v in variables + optimizer.variables]

    def step(weights, state, grads):
        return optimizer.stateless_apply(state, grads, weights)

    step = jax.jit(step, donate_argnums=(0, 1))
    step(held[:2], held[2:], gradients(1)[0])


@pytest.mark.tensorflow  # On JAX, Keras refuses another set of variables.
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_layer_that_was_frozen_since_stays_where_it_is_put(jit_compile):
    layers = [keras.layers.Dense(3), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    optimizer = Lookahead(optimizers.SGD(0.1), sync_period=4)
    x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
    model.compile(optimizer, loss="mse", jit_compile=jit_compile)
    for _ in range(2):
        model.train_on_batch(x, y)
    layers[0].trainable = False
    model.compile(optimizer, loss="mse", jit_compile=jit_compile)
    put = [np.full((4, 3), 7.0, "float32"), np.zeros(3, "float32")]
    layers[0].set_weights(put)
    trained = layers[1].get_weights()[0]
    for _ in range(8):
        model.train_on_batch(x, y)
    with optimizer.slow_weights():
        shown = layers[0].get_weights()
        assert np.abs(layers[1].get_weights()[0] - slow(optimizer)[2]).max() == 0
    for values in (shown, layers[0].get_weights()):
        for value, expected in zip(values, put, strict=True):
            np.testing.assert_array_equal(value, expected)
    assert np.abs(layers[1].get_weights()[0] - trained).max() > 0
