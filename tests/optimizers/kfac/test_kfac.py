import warnings

import keras
import numpy as np
import pytest
from keras import ops

from harness import check_optimizer
from harness.curvature import check_same_step, curvatures
from harness.training import QUICK, attach
from kzoo.optimizers import KFAC, Lookahead
from kzoo.optimizers.kfac.objective import Objective

# JAX has no float64 unless it is enabled.
DTYPE = "float64" if keras.backend.backend() == "tensorflow" else "float32"
TOL = 1e-9 if DTYPE == "float64" else 2e-4
LOSSES = {
    "gaussian": keras.losses.MeanSquaredError(),
    "categorical": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "bernoulli": keras.losses.BinaryCrossentropy(from_logits=True),
}


def network(activation="tanh", sizes=(3, 4, 2), dtype=DTYPE):
    """Dense layers; all but the last have the activation."""
    rng = np.random.default_rng(7)
    model = keras.Sequential([keras.Input((sizes[0],), dtype=DTYPE)])
    for i, size in enumerate(sizes[1:], 1):
        last = i == len(sizes) - 1
        model.add(keras.layers.Dense(size, None if last else activation, dtype=dtype))
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    return model


def inputs(n=5, size=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, size)).astype(DTYPE)


def labels(n, likelihood, size=2):
    rng = np.random.default_rng(1)
    if likelihood == "categorical":
        return rng.integers(0, size, n)
    y = rng.normal(size=(n, size)).astype(DTYPE)
    return (y > 0).astype(DTYPE) if likelihood == "bernoulli" else y


def compiled(model, likelihood="gaussian", mode=QUICK, **arguments):
    optimizer = KFAC(model, **{"fisher": "exact", "seed": 0, **arguments})
    model.compile(optimizer, LOSSES[likelihood], **mode)
    return optimizer


def observed(model, x, y=None, **arguments):
    """The optimizer after it has seen a batch."""
    optimizer = compiled(model, **arguments)
    optimizer.build(model.trainable_variables)
    optimizer.observe(ops.convert_to_tensor(x), y)
    return optimizer


def factors(optimizer):
    """Pairs of A and G in NumPy."""
    return [
        tuple(v.numpy().astype("float64") for v in named.values())
        for named in optimizer.factors.values()
    ]


def exact(model, x, likelihood="gaussian"):
    weights = [w.astype("float64") for w in model.get_weights()]
    activations = [layer.activation.__name__ for layer in model.layers]
    pairs = list(zip(weights[::2], weights[1::2], strict=True))
    return curvatures(pairs, activations, x, likelihood)


@pytest.mark.slow
def test_contract():
    check_optimizer(
        lambda: KFAC(
            None,
            learning_rate=0.05,
            damping=0.1,
            momentum=0.8,
            norm_constraint=0.01,
            factor_decay=0.5,
            factor_update_period=2,
            inverse_update_period=3,
            subsample=2,
            fisher="exact",
            seed=0,
        )
    )


# --- factors against the exact curvature ------------------------------------------


@pytest.mark.parametrize("likelihood", LOSSES)
def test_of_one_example_the_factors_are_exact(likelihood):
    model, x = network(), inputs(1)
    optimizer = observed(model, x, likelihood=likelihood)
    for (a, g), expected in zip(
        factors(optimizer), exact(model, x, likelihood), strict=True
    ):
        np.testing.assert_allclose(np.kron(a, g), expected, rtol=TOL, atol=TOL)


def test_of_a_deep_linear_network_the_factors_are_exact():
    model, x = network("linear", (3, 4, 3, 2)), inputs(5)
    optimizer = observed(model, x)
    for (a, g), expected in zip(factors(optimizer), exact(model, x), strict=True):
        np.testing.assert_allclose(np.kron(a, g), expected, rtol=TOL, atol=TOL)


@pytest.mark.parametrize("likelihood", LOSSES)
def test_sampled_factors_tend_to_the_exact_ones(likelihood):
    model, x = network(), inputs(1)
    optimizer = observed(
        model, np.repeat(x, 20000, 0), likelihood=likelihood, fisher="sampled"
    )
    for (a, g), expected in zip(
        factors(optimizer), exact(model, x, likelihood), strict=True
    ):
        largest = np.abs(expected).max()
        np.testing.assert_allclose(np.kron(a, g), expected, atol=0.04 * largest)


def test_empirical_factors_have_the_labels():
    # Of one dense layer with the loss |y - ŷ|² / D, g = √(2/D) (ŷ - y), squared.
    model, x = network(sizes=(3, 2)), inputs(5)
    y = labels(5, "gaussian")
    optimizer = observed(model, x, ops.convert_to_tensor(y), fisher="empirical")
    ((_, g),) = factors(optimizer)
    errors = ops.convert_to_numpy(model(x)) - y
    np.testing.assert_allclose(g, errors.T @ errors / 5, rtol=TOL)


@pytest.mark.parametrize("kind", ["probabilities", "one output", "sum", "weights"])
def test_what_else_losses_say_of_the_curvature(kind):
    x, scale = inputs(1), 1.0
    sample_weight = None
    if kind == "probabilities":
        model, logits = network(), network()
        model.layers[-1].activation = keras.activations.softmax
        loss, expected = "categorical_crossentropy", exact(logits, x, "categorical")
    elif kind == "one output":
        model, logits = network(sizes=(3, 4, 1)), network(sizes=(3, 4, 1))
        model.layers[-1].activation = keras.activations.sigmoid
        loss, expected = "binary_crossentropy", exact(logits, x, "bernoulli")
    else:
        model, loss = network(), keras.losses.MeanSquaredError(reduction="sum")
        expected = exact(model, x)
        if kind == "weights":
            sample_weight, scale = np.array([0.3], DTYPE), 0.3
    optimizer = KFAC(model, fisher="exact")
    model.compile(optimizer, loss)
    optimizer.build(model.trainable_variables)
    optimizer.observe(ops.convert_to_tensor(x), None, sample_weight)
    for (a, g), one in zip(factors(optimizer), expected, strict=True):
        np.testing.assert_allclose(
            np.kron(a, g), scale * one, rtol=1e-5 + TOL, atol=1e-5
        )


@pytest.mark.parametrize(
    "reduction", ["sum", "sum_over_batch_size", "mean_with_sample_weight"]
)
def test_masks_and_weights_count_as_in_the_loss(reduction):
    # The mean squared error is quadratic in the bias: its second difference is G, on
    # the diagonal.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, 2)).astype("float32")
    x[0, 1:] = x[2, 2] = 0
    y, weights = rng.normal(size=(4, 3, 2)), np.array([0.3, 1.0, 2.0, 0.5])
    dense = keras.layers.Dense(2, use_bias=True)
    model = keras.Sequential([keras.Input((3, 2)), keras.layers.Masking(), dense])
    optimizer = KFAC(model, 0.0, momentum=0.0, fisher="exact")
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    model.compile(optimizer, loss, **QUICK)
    for given in (None, weights[:, None] * np.ones((4, 3))):
        losses = []
        for bias in (-1.0, 0.0, 1.0):
            dense.bias.assign([bias, 0.0])
            losses.append(model.test_on_batch(x, y, given))
        optimizer.build(model.trainable_variables)
        for variable in optimizer.variables:
            if "factor_updates" in variable.name:
                variable.assign(0)
        model.train_on_batch(x, y, given)
        ((a, g),) = factors(optimizer)
        expected = losses[0] - 2 * losses[1] + losses[2]
        np.testing.assert_allclose(g, expected * np.eye(2), rtol=1e-4, atol=1e-5)
        objective = Objective(model, ops.convert_to_tensor(x), None, given)
        unit = ops.convert_to_tensor(np.eye(2, dtype="float32")[0])
        found = objective.curvature([dense.bias], [[unit]])
        np.testing.assert_allclose(found, [[expected]], rtol=1e-4, atol=1e-5)
        there = x[(x != 0).any(-1)]
        np.testing.assert_allclose(a[0, 0], np.mean(there[:, 0] ** 2), rtol=1e-5)


def test_a_part_of_a_sum_stands_for_the_whole():
    x = np.repeat(inputs(3), 2, axis=0)
    found = []
    for subsample in (1, 2):
        model = network()
        optimizer = KFAC(model, fisher="exact", subsample=subsample)
        model.compile(optimizer, keras.losses.MeanSquaredError(reduction="sum"))
        optimizer.build(model.trainable_variables)
        optimizer.observe(ops.convert_to_tensor(x))
        found.append(factors(optimizer))
    for one, other in zip(*found, strict=True):
        for factor, expected in zip(one, other, strict=True):
            np.testing.assert_allclose(factor, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_whose_likelihood_is_not_known_is_refused():
    model = network()
    model.compile(KFAC(model), "mae", **QUICK)
    with pytest.raises(ValueError, match="likelihood is known.*Received: loss='mae'"):
        model.train_on_batch(inputs(), labels(5, "gaussian"))


# --- averages ---------------------------------------------------------------------


def test_the_average_begins_with_the_first_batch():
    model, batches = network(), [inputs(5, seed=seed) for seed in range(3)]
    each = [factors(observed(model, x)) for x in batches]
    optimizer = compiled(model, factor_decay=0.6)
    optimizer.build(model.trainable_variables)
    expected = each[0]
    # min(1 - 1/k, 0.6): 0, 1/2, 0.6.
    for x, one, keep in zip(batches, each, (0.0, 0.5, 0.6), strict=True):
        optimizer.observe(ops.convert_to_tensor(x))
        expected = [
            tuple(keep * e + (1 - keep) * o for e, o in zip(pair, new, strict=True))
            for pair, new in zip(expected, one, strict=True)
        ]
        for found, pair in zip(factors(optimizer), expected, strict=True):
            for f, e in zip(found, pair, strict=True):
                np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-6)


def test_the_decay_of_the_average_may_be_a_schedule():
    model, batches = network(sizes=(3, 2)), [inputs(5, seed=seed) for seed in range(4)]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.2, 0.6])
    optimizer = compiled(model, learning_rate=0.0, factor_decay=schedule)
    expected = 0.0
    # min(1 - 1/k, 0.2), and from the fourth on 0.6.
    for x, keep in zip(batches, (0.0, 0.2, 0.2, 0.6), strict=True):
        model.train_on_batch(x, labels(5, "gaussian"))
        expected = keep * expected + (1 - keep) * x.T @ x / 5
        a = factors(optimizer)[0][0][:3, :3]
        np.testing.assert_allclose(a, expected, rtol=1e-5, atol=1e-6)
    again = KFAC.from_config(optimizer.get_config())
    assert float(again.factor_decay(3)) == pytest.approx(0.6)


def test_a_damping_is_assigned_only_if_it_is_one():
    optimizer = KFAC(None, damping=0.5)
    for wrong in (0.0, -1.0, float("nan"), "much"):
        with pytest.raises(ValueError, match="Received: damping="):
            optimizer.damping = wrong
    assert float(optimizer.damping) == 0.5
    optimizer.damping = 2
    assert float(optimizer.damping) == 2.0
    optimizer.damping *= 0.25
    assert float(optimizer.damping) == 0.5
    with pytest.raises(ValueError, match="Received: damping=-0.5"):
        optimizer.damping *= -1.0


def check_mean(optimizer, single):
    """The optimizer's factors are the mean of what is given, of whole networks."""
    for layer, found in enumerate(factors(optimizer)):
        for i, factor in enumerate(found):
            expected = np.mean([one[layer][i] for one in single], axis=0)
            np.testing.assert_allclose(factor, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [None, 2])
def test_burning_in_measures_batches_and_changes_no_weight(steps):
    model = network()
    weights, batches = model.get_weights(), [inputs(seed=i) for i in range(3)]
    single = [factors(observed(model, x)) for x in batches]
    optimizer = compiled(model, gradient_accumulation_steps=steps)
    optimizer.burn_in(iter([*batches[:2], (batches[2], labels(5, "gaussian"))]))
    check_mean(optimizer, single)
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert int(optimizer.iterations) == 0
    # The first batch of training, or the mean of those of an update, is the fourth one.
    for _ in range(steps or 1):
        model.train_on_batch(batches[0], labels(5, "gaussian"))
    check_mean(optimizer, [*single, single[0]])
    with pytest.raises(ValueError, match="a KFAC without a model"):
        KFAC(None).burn_in(batches)


def test_a_part_of_the_batch_may_be_enough():
    x, y = inputs(7), ops.convert_to_tensor(labels(7, "gaussian"))
    arguments = {"fisher": "empirical"}
    found = factors(observed(network(), x, y, subsample=3, **arguments))
    expected = factors(observed(network(), x[::3], y[::3], **arguments))
    for one, other in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert not np.allclose(found[0][0], factors(observed(network(), x))[0][0])


def test_factors_that_are_not_finite_are_left_out_and_counted():
    model, x = network(), inputs()
    optimizer = observed(model, x)
    before = factors(optimizer)
    infinite = x.copy()
    infinite[0, 0] = np.inf
    optimizer.observe(ops.convert_to_tensor(infinite))
    assert optimizer.skipped_updates == 1
    np.testing.assert_equal(factors(optimizer), before)
    optimizer.observe(ops.convert_to_tensor(x))
    assert optimizer.skipped_updates == 1
    np.testing.assert_allclose(factors(optimizer)[0][0], before[0][0], rtol=1e-5)


@pytest.mark.parametrize("approximation", ["kronecker", "lag_one"])
def test_where_an_inverse_is_not_finite_the_one_before_stays(approximation):
    recurrent = keras.layers.SimpleRNN(3)
    model = keras.Sequential([keras.Input((2, 3)), recurrent, keras.layers.Dense(2)])
    optimizer = observed(
        model, inputs(10).reshape(5, 2, 3), approximation=approximation
    )
    first, second = optimizer._hidden.parts
    optimizer._refresh()
    before = [[c.numpy() for c in part.caches] for part in (first, second)]
    factor = first.factors[1].numpy()
    first.factors[1].assign(np.nan * factor)
    second.factors[1].assign(2 * second.factors[1].numpy())
    optimizer._refresh()
    assert optimizer.skipped_inverses == 1
    np.testing.assert_equal([c.numpy() for c in first.caches], before[0])
    assert not np.allclose(second.caches[-1].numpy(), before[1][-1])
    first.factors[1].assign(2 * factor)
    optimizer._refresh()
    assert optimizer.skipped_inverses == 1
    assert not np.allclose(first.caches[-2].numpy(), before[0][-2])


def test_over_accumulated_batches_factors_are_averaged():
    batches, y = [inputs(4, seed=seed) for seed in range(5)], labels(4, "gaussian")
    each = [factors(observed(network(), x)) for x in batches]
    model = network()
    optimizer = compiled(
        model, learning_rate=0.0, gradient_accumulation_steps=2, clipnorm=1e-3
    )
    # After 1, 2, ... batches, the average of those before the last update.
    for done, averaged in enumerate((0, 2, 2, 4, 4)):
        model.train_on_batch(batches[done], y)
        for i, found in enumerate(factors(optimizer)):
            for j in range(2) if averaged else ():
                expected = np.mean([one[i][j] for one in each[:averaged]], axis=0)
                np.testing.assert_allclose(found[j], expected, rtol=1e-5, atol=1e-6)


def test_the_loss_scale_does_not_touch_the_factors():
    x, y = inputs(8), labels(8, "categorical")
    found = {}
    for scale in (1.0, 1024.0):
        keras.utils.clear_session(free_memory=False)
        model = network(dtype="mixed_float16")
        inner = KFAC(model, learning_rate=0.0, fisher="exact")
        outer = keras.optimizers.LossScaleOptimizer(
            inner, initial_scale=scale, dynamic_growth_steps=2
        )
        model.compile(outer, LOSSES["categorical"], **QUICK)
        for _ in range(5):
            model.train_on_batch(x, y)
        assert float(outer.dynamic_scale.numpy()) == 4 * scale
        found[scale] = factors(inner)
    wide = factors(observed(network(), x, likelihood="categorical"))
    for one, other, expected in zip(found[1.0], found[1024.0], wide, strict=True):
        for i in range(2):  # A, and G.
            np.testing.assert_allclose(one[i], other[i], rtol=1e-6)
            largest = np.abs(expected[i]).max()
            np.testing.assert_allclose(one[i], expected[i], atol=0.01 * largest)


# --- updates ----------------------------------------------------------------------


def step(model, x, y, **arguments):
    """A model's weights' change by one step, and its gradients before."""
    compiled(model, **{"momentum": 0.0, "learning_rate": 1.0, **arguments})
    before = [w.astype("float64") for w in model.get_weights()]
    model.train_on_batch(x, y)
    return [w - b for w, b in zip(model.get_weights(), before, strict=True)]


def gradient(model, x, y):
    """The mean squared error's gradients of one layer, as a matrix with the bias."""
    a = np.concatenate([x, np.ones((len(x), 1))], 1)
    error = ops.convert_to_numpy(model(x)) - y
    return 2 / error.size * a.T @ error


def test_the_step_is_the_gradient_times_the_inverse_of_a_kronecker_product():
    model, x, y = network(sizes=(3, 2)), inputs(), labels(5, "gaussian")
    gradients = gradient(model, x, y)
    a = np.concatenate([x, np.ones((5, 1))], 1)
    a, g, root = a.T @ a / 5, np.eye(2), np.sqrt(0.03)
    pi = np.sqrt(np.trace(a) / 4)
    product = np.kron(a + pi * root * np.eye(4), g + root / pi * np.eye(2))
    expected = -np.linalg.solve(product, gradients.ravel()).reshape(4, 2)
    kernel, bias = step(model, x, y, damping=0.03)
    found = np.concatenate([kernel, bias[None]])
    np.testing.assert_allclose(found, expected, rtol=1e-5 + TOL, atol=1e-6)


def test_with_much_damping_the_step_is_along_the_gradient():
    model, x, y = network(sizes=(3, 2)), inputs(), labels(5, "gaussian")
    expected = -gradient(model, x, y)
    damping = 1e8
    kernel, bias = step(model, x, y, damping=damping, learning_rate=damping)
    found = np.concatenate([kernel, bias[None]])
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.tensorflow  # Without damping float32 is not enough.
def test_undamped_steps_do_not_depend_on_the_coordinates_of_activations():
    # h = tanh(...) goes through a fixed map h M + d, before and after which the layers
    # are transformed so that the network is the same function.
    x, y = inputs(60), labels(60, "gaussian")
    rng = np.random.default_rng(5)
    maps = {False: (np.eye(3), np.zeros(3)), True: rng.normal(size=(2, 3, 3))}
    maps[True] = (rng.normal(size=(3, 3)), rng.normal(size=3))
    of_input = (rng.normal(size=(3, 3)), rng.normal(size=3))
    outputs = []
    for changed in (False, True):
        model = network(sizes=(3, 3, 3, 2))
        first, fixed, last = model.layers
        fixed.activation = keras.activations.linear
        fixed.trainable = False
        m, d = maps[changed]
        kernel, bias = last.get_weights()
        fixed.set_weights([m, d])
        last.set_weights(
            [np.linalg.solve(m, kernel), bias - d @ np.linalg.solve(m, kernel)]
        )
        given = x
        if changed:
            b, c = of_input
            given = x @ b + c
            kernel, bias = first.get_weights()
            kernel = np.linalg.solve(b, kernel)
            first.set_weights([kernel, bias - c @ kernel])
        start = ops.convert_to_numpy(model(given))
        step(model, given, y, damping=1e-13, learning_rate=0.1)
        outputs.append((start, ops.convert_to_numpy(model(given))))
    check_same_step(*outputs)


@pytest.mark.parametrize("constraint, clips", [(1e-3, True), (1e3, False)])
def test_the_norm_constraint_bounds_the_step(constraint, clips):
    x, y = inputs(), labels(5, "gaussian")
    model = network(sizes=(3, 2))
    gradients = gradient(model, x, y)
    free = step(network(sizes=(3, 2)), x, y, learning_rate=0.5)
    bound = step(model, x, y, learning_rate=0.5, norm_constraint=constraint)
    if not clips:
        for one, other in zip(free, bound, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
        return
    # Its change is -η ν U: η² ν² Uᵀ∇h is c.
    nu = np.sqrt(
        constraint / (-0.5 * np.sum(np.vstack([free[0], free[1]]) * gradients))
    )
    for one, other in zip(free, bound, strict=True):
        np.testing.assert_allclose(nu * one, other, rtol=1e-4)


@pytest.mark.parametrize("constraint", [None, 1e-11])
def test_momentum_and_schedules(constraint):
    model, x, y = network(sizes=(3, 2)), inputs(), labels(5, "gaussian")
    schedule = keras.optimizers.schedules.ExponentialDecay
    optimizer = compiled(
        model,
        learning_rate=schedule(0.1, 1, 0.5),
        damping=schedule(1e8, 1, 0.5),
        momentum=schedule(0.8, 1, 0.5),
        norm_constraint=constraint and schedule(constraint, 1, 0.5),
    )
    m = np.zeros((4, 2))
    for t in range(3):
        before = np.vstack(model.get_weights()).astype("float64")
        # With so much damping, U = ∇h / λ.
        u = gradient(model, x, y) / (1e8 * 0.5**t)
        nu, eta = 1.0, 0.1 * 0.5**t
        if constraint:  # It bounds this step, and not what the momentum has.
            size = np.sum(u * gradient(model, x, y)) * eta**2
            nu = np.sqrt(constraint * 0.5**t / size)
            assert nu < 0.9
        m = 0.8 * 0.5**t * m - eta * nu * u
        model.train_on_batch(x, y)
        change = np.vstack(model.get_weights()) - before
        scale = 1e8 if DTYPE == "float64" else None
        if scale:
            np.testing.assert_allclose(scale * change, scale * m, rtol=1e-3)
        np.testing.assert_allclose(float(optimizer.damping), 1e8 * 0.5 ** (t + 1))


def test_weight_decay_and_polyaks_average_are_apart_from_the_step():
    x, y, rate = inputs(), labels(5, "gaussian"), {"learning_rate": 0.5}
    plain = step(network(sizes=(3, 2)), x, y, norm_constraint=1e-3, **rate)
    model = network(sizes=(3, 2))
    before = model.get_weights()
    kept = {"weight_decay": 0.1, "use_ema": True, "ema_momentum": 0.9}
    decayed = step(model, x, y, norm_constraint=1e-3, **rate, **kept)
    for found, change, w in zip(decayed, plain, before, strict=True):
        np.testing.assert_allclose(found, change - 0.5 * 0.1 * w, rtol=1e-5, atol=1e-6)
    first = model.get_weights()
    model.train_on_batch(x, y)
    second = model.get_weights()
    model.optimizer.finalize_variable_values(model.trainable_variables)
    for found, one, other in zip(model.get_weights(), first, second, strict=True):
        np.testing.assert_allclose(found, 0.9 * one + 0.1 * other, rtol=1e-5)


def test_periods():
    model, x, y = network(), inputs(), labels(5, "gaussian")
    optimizer = compiled(
        model, factor_update_period=2, inverse_update_period=4, learning_rate=0.01
    )
    optimizer.build(model.trainable_variables)
    changes = []
    for _ in range(7):
        before = [v.numpy() for v in optimizer.variables]
        model.train_on_batch(x, y)
        changed = {
            v.name.rsplit("_", 1)[-1]
            for v, b in zip(optimizer.variables, before, strict=True)
            if not np.array_equal(v.numpy(), b)
        }
        changes.append(("A" in changed, "inverse" in changed))
    # The first layer's A is that of the inputs; the second one's changes.
    factors_at = [i for i, (a, _) in enumerate(changes) if a]
    inverses_at = [i for i, (_, inverse) in enumerate(changes) if inverse]
    assert factors_at == [0, 2, 4, 6]
    assert inverses_at == [0, 2, 4]  # Step 1 inverts the same factors again.


# --- the model --------------------------------------------------------------------


def test_the_model_is_as_without_the_optimizer(tmp_path):
    x, y = inputs().astype("float32"), labels(5, "gaussian").astype("float32")
    model, twin = network(dtype="float32"), network(dtype="float32")

    def summary(model):
        lines = []
        model.summary(print_fn=lines.append)
        return lines

    def parameters(lines):
        lines = "\n".join(lines).splitlines()
        # Beside the optimizer's, the total counts them too.
        found = [line for line in lines if "rainable params" in line]
        return [line for line in found if "Opt" not in line]

    names = [v.path.split("/", 1)[-1] for v in model.variables]
    before = summary(model)
    attached = compiled(model)
    assert summary(model) == before
    model.train_on_batch(x, y)
    assert [v.path.split("/", 1)[-1] for v in model.variables] == names
    assert parameters(before) == parameters(summary(model)) != []
    shapes = [[w.shape for w in one.get_weights()] for one in (model, twin)]
    assert shapes[0] == shapes[1]
    assert type(model.layers[0]).call is keras.layers.Dense.call
    assert not {"call"} & set(vars(model.layers[0]))
    assert model.layers[0].activation is keras.activations.tanh
    clone = keras.models.clone_model(model)
    assert clone.get_config() == model.get_config()
    model.save_weights(tmp_path / "model.weights.h5")
    # Another optimizer trains it as its twin, and the first one sees nothing.
    twin.set_weights(model.get_weights())
    seen = int(attached._updates.numpy())
    for one in (model, twin):
        one.compile(keras.optimizers.SGD(0.1), "mse", **QUICK)
        one.train_on_batch(x, y)
    np.testing.assert_allclose(model.get_weights()[0], twin.get_weights()[0])
    assert int(attached._updates.numpy()) == seen


def test_the_second_pass_leaves_no_trace():
    # Batch statistics and dropout's seeds go on as without it.
    x, y = inputs().astype("float32"), labels(5, "gaussian").astype("float32")

    def make():
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(4),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.5, seed=1),
                keras.layers.Dense(2),
            ]
        )
        return model

    model, twin = make(), make()
    compiled(model, learning_rate=0.0, fisher="sampled")
    model.train_on_batch(x, y)
    twin.compile(keras.optimizers.SGD(0.0), "mse", **QUICK)
    twin.train_on_batch(x, y)
    for one, other in zip(
        model.non_trainable_variables, twin.non_trainable_variables, strict=True
    ):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-6)


@pytest.mark.parametrize("fisher", ["sampled", "empirical", "exact"])
def test_weights_without_a_block_have_a_diagonal_curvature(fisher):
    # Each of 500 weights scales one input: s = w x, D = (2/500) x² for each, also with
    # labels that are 1 off. What is squared is a sum over examples with random signs,
    # which each of the positions of s has of its own.
    @keras.saving.register_keras_serializable(package="test")
    class Scale(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=shape[1:], name="scale")

        def call(self, x):
            return x * self.scale

    tail = keras.layers.Reshape((500, 1))
    model = keras.Sequential([keras.Input((500,)), Scale(), tail])
    x = np.random.default_rng(0).normal(size=(1, 500)).astype("float32")
    batch = np.repeat(x, 40, 0)
    with pytest.warns(UserWarning, match="diagonal curvature: .*scale"):
        optimizer = observed(model, batch, model(batch) - 1, fisher=fisher)
    ((d,),) = factors(optimizer)
    ratio = np.mean(d / (2 / 500 * x[0] ** 2))
    assert abs(ratio - 1) < 4 * np.sqrt(2 / 500)
    # The step is the gradient divided by D + λ.
    weights = model.trainable_variables
    before, gradient = weights[0].numpy(), np.linspace(-1, 1, 500, dtype="float32")
    optimizer.apply([ops.convert_to_tensor(gradient)], weights)
    expected = -0.01 * gradient / (d + 0.01)
    np.testing.assert_allclose(weights[0].numpy() - before, expected, atol=1e-5)


def test_a_weight_without_a_block_may_be_frozen_later():
    prelu = keras.layers.PReLU(dtype=DTYPE)
    last = keras.layers.Dense(2, dtype=DTYPE)
    model = keras.Sequential([keras.Input((3,), dtype=DTYPE), prelu, last])
    x, y = inputs(), labels(5, "gaussian")
    with pytest.warns(UserWarning, match="diagonal curvature: .*alpha"):
        optimizer = compiled(model)
        model.train_on_batch(x, y)
    before = prelu.get_weights()
    prelu.trainable = False
    optimizer.observe(ops.convert_to_tensor(x))
    a = np.concatenate([ops.convert_to_numpy(prelu(x)), np.ones((5, 1))], 1)
    first = np.concatenate([np.maximum(x, 0), np.ones((5, 1))], 1)
    expected = (first.T @ first + a.T @ a) / 10
    np.testing.assert_allclose(factors(optimizer)[0][0], expected, rtol=1e-5)
    np.testing.assert_array_equal(prelu.get_weights(), before)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_loaded_model_goes_on_as_if_it_had_not_stopped(tmp_path, wrapped):
    x, y = inputs(6).astype("float32"), labels(6, "categorical")
    model = network(dtype="float32")
    optimizer = KFAC(model, fisher="sampled", seed=3, inverse_update_period=4)
    if wrapped:
        optimizer = Lookahead(optimizer, sync_period=3)
    model.compile(optimizer, LOSSES["categorical"], **QUICK)
    for _ in range(2):
        model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"call KFAC\.resume\(model\)"):
        loaded.train_on_batch(x, y)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    resumed = KFAC.resume(loaded)
    assert resumed.model is loaded
    for one in (model, loaded):
        one.run_eagerly = QUICK.get("run_eagerly", False)
        for _ in range(3):
            one.train_on_batch(x, y)
    for one, other in zip(
        model.optimizer.variables, loaded.optimizer.variables, strict=True
    ):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-6, atol=1e-7)
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_a_model_that_is_not_built_and_has_its_own_training_step():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)
            self.steps = 0

        def call(self, x):
            return self.dense(x)

        def train_step(self, *args):
            self.steps += 1
            return super().train_step(*args)

    model = Model()
    optimizer = compiled(model)
    x, y = inputs().astype("float32"), labels(5, "gaussian").astype("float32")
    model.train_on_batch(x, y)
    assert model.steps
    a = np.concatenate([x, np.ones((5, 1))], 1)
    np.testing.assert_allclose(factors(optimizer)[0][0], a.T @ a / 5, rtol=1e-5)


def test_a_layer_that_is_used_twice_has_both_uses():
    shared = keras.layers.Dense(3, dtype=DTYPE)
    inner = keras.Input((3,), dtype=DTYPE)
    model = keras.Model(inner, shared(keras.layers.Activation("tanh")(shared(inner))))
    x = inputs(4)
    a, g = factors(observed(model, x))[0]
    h = np.tanh(ops.convert_to_numpy(shared(x)))
    rows = np.concatenate([x, h]), np.ones((8, 1))
    rows = np.concatenate(rows, 1)
    np.testing.assert_allclose(a, rows.T @ rows / 8, rtol=1e-5)
    kernel = shared.get_weights()[0].astype("float64")
    back = [np.eye(3) * (2 / 3) ** 0.5, kernel.T * (2 / 3) ** 0.5]
    first = [back[1] * (1 - row**2) for row in h]
    expected = back[0].T @ back[0] + sum(b.T @ b for b in first) / 4
    np.testing.assert_allclose(g, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"damping": 0.0},
        {"momentum": 1.0},
        {"norm_constraint": 0.0},
        {"factor_decay": 1.0},
        {"factor_update_period": 0},
        {"inverse_update_period": 0.5},
        {"subsample": 0},
        {"fisher": "true"},
        {"sharing": "both"},
        {"model": keras.layers.Dense(1)},
    ],
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=rf"Received: {next(iter(arguments))}="):
        KFAC(**{"model": None, **arguments})


def test_another_model_is_refused():
    model, other = network(), network()
    model.compile(KFAC(other, fisher="exact"), "mse", **QUICK)
    with pytest.raises(ValueError, match="the model that the optimizer was given"):
        model.train_on_batch(inputs(), labels(5, "gaussian"))
    # Also a part of the model that is trained, or a model of which that is a part.
    x, y = inputs().astype("float32"), labels(5, "gaussian").astype("float32")
    inner = network(dtype="float32")
    outer = keras.Sequential([keras.Input((3,)), inner, keras.layers.Dense(2)])
    outer.compile(KFAC(inner, fisher="exact"), "mse", **QUICK)
    with pytest.raises(ValueError, match=f"weights of another: .'{outer.name}/"):
        outer.train_on_batch(x, y)
    inner.compile(KFAC(outer, fisher="exact"), "mse", **QUICK)
    with pytest.warns(UserWarning, match=f"seen no batch of {outer.name}"):
        inner.train_on_batch(x, y)


def test_in_a_loop_of_ones_own_the_first_batch_counts():
    x, model = inputs(), network()
    optimizer = compiled(model)
    optimizer.observe(ops.convert_to_tensor(x))
    expected = factors(observed(model, x))
    for one, other in zip(factors(optimizer), expected, strict=True):
        for factor, value in zip(one, other, strict=True):
            np.testing.assert_array_equal(factor, value)
    with pytest.raises(ValueError, match="expected a model that is compiled"):
        KFAC(network()).observe(ops.convert_to_tensor(x))


def test_resume_needs_a_model_with_it():
    model = network()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="compiled with KFAC"):
        KFAC.resume(model)
    assert attach(model) is model
    with pytest.raises(ValueError, match="Received: model=None"):
        KFAC(None).attach(None)


@pytest.mark.slow
def test_a_transformer_learns():
    # An embedding, attention, norms, and dense layers at many positions, compiled.
    x = keras.Input((6,), dtype="int32")
    h = keras.layers.Embedding(8, 4)(x)
    attended = keras.layers.MultiHeadAttention(2, 3)(h, h)
    h = keras.layers.LayerNormalization()(h + attended)
    model = keras.Model(x, keras.layers.Dense(8)(h))
    optimizer = KFAC(
        model, 0.1, norm_constraint=1e-2, approximation="ekfac", fisher="sampled"
    )
    data = np.random.default_rng(0).integers(0, 8, (32, 6))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "KFAC knows no")
        model.compile(optimizer, LOSSES["categorical"], jit_compile=True)
        losses = [model.train_on_batch(data, data) for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]
