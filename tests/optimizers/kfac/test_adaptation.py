import json

import keras
import numpy as np
import pytest
from keras import ops

from harness.curvature import curvature
from harness.training import QUICK, check_lowering, check_steps, compile_model
from kzoo.optimizers import KFAC, Adaptation
from kzoo.optimizers.kfac.adaptation import lowest
from kzoo.optimizers.kfac.objective import Objective

# JAX has no float64 unless it is enabled.
WIDE = keras.backend.backend() == "tensorflow"
DTYPE = "float64" if WIDE else "float32"
TANH = ("tanh", "linear")
LOSSES = {
    "gaussian": keras.losses.MeanSquaredError(),
    "categorical": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "bernoulli": keras.losses.BinaryCrossentropy(from_logits=True),
}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def network(activations=TANH, sizes=(3, 4, 2)):
    """Dense layers, whose weights are always the same."""
    model = keras.Sequential([keras.Input(sizes[:1], dtype=DTYPE)])
    for size, activation in zip(sizes[1:], activations, strict=True):
        model.add(keras.layers.Dense(size, activation, dtype=DTYPE))
    rng = np.random.default_rng(7)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    return model


def data(n=6, seed=0):
    return numbers(n, 3, seed=seed).astype(DTYPE), numbers(n, 2, seed=9).astype(DTYPE)


def compiled(model, loss="mse", mode=QUICK, damping=0.1, **arguments):
    """The optimizer, which follows the exact curvature of each batch at once."""
    exact = {"fisher": "exact", "factor_decay": 0.0, "inverse_update_period": 1}
    optimizer = KFAC(model, damping=damping, **{**exact, **arguments})
    model.compile(optimizer, loss, **mode)
    return optimizer


def joined(arrays):
    """Kernels and biases, in turn, as one vector: each layer's matrix row by row."""
    pairs = zip(arrays[::2], arrays[1::2], strict=True)
    return np.concatenate([np.vstack([w, b[None]]).ravel() for w, b in pairs])


def parted(vector, model):
    """What `joined` has joined."""
    found = []
    for kernel in model.get_weights()[::2]:
        n, m = kernel.shape
        matrix, vector = np.split(vector, [(n + 1) * m])
        matrix = matrix.reshape(n + 1, m)
        found += [matrix[:-1], matrix[-1]]
    return found


# --- the exact curvature ----------------------------------------------------------


@pytest.mark.parametrize("likelihood", LOSSES)
def test_products_with_the_exact_curvature(likelihood):
    model, (x, y) = network(), data()
    model.compile("sgd", LOSSES[likelihood])
    vectors = numbers(2, 26)
    objective = Objective(model, ops.convert_to_tensor(x), y, None)
    directions = [
        [ops.convert_to_tensor(v.astype(DTYPE)) for v in parted(vector, model)]
        for vector in vectors
    ]
    for subsample in (1, 2):
        found = objective.curvature(model.trainable_variables, directions, subsample)
        weights = list(zip(*[iter(model.get_weights())] * 2, strict=True))
        f = curvature(weights, TANH, x[::subsample], likelihood)
        expected = vectors @ f @ vectors.T
        np.testing.assert_allclose(found, expected, rtol=1e-9 if WIDE else 1e-3)


def test_weights_of_examples_and_of_outputs_are_those_of_the_loss():
    # Two outputs of one layer: the loss is quadratic, and F all of its curvature.
    x = keras.Input((3,), dtype=DTYPE)
    outputs = [keras.layers.Dense(2, dtype=DTYPE)(x) for _ in range(2)]
    model = keras.Model(x, outputs)
    model.compile("sgd", ["mse", "mse"], loss_weights=[1.0, 0.3])
    x, y = map(ops.convert_to_tensor, data())
    sample_weight = ops.convert_to_tensor(np.linspace(0.1, 2, 6).astype(DTYPE))
    objective = Objective(model, x, [y, y], [sample_weight] * 2)
    variables = model.trainable_variables
    model._compute_loss(x, [y, y], model(x), None)  # Builds the loss.
    delta = [ops.convert_to_tensor(numbers(*v.shape).astype(DTYPE)) for v in variables]
    h = [objective.loss(variables, [t * d for d in delta]) for t in (-1, 0, 1)]
    expected = h[0] - 2 * h[1] + h[2]
    found = objective.curvature(variables, [delta])
    np.testing.assert_allclose(found, [[expected]], rtol=1e-5)


# --- the quadratic model ----------------------------------------------------------


def lowest_of(gradient, directions, c):
    """`lowest` with vectors and a matrix C, in NumPy."""

    def products(found):
        found = np.stack([ops.convert_to_numpy(v) for (v,) in found])
        return ops.convert_to_tensor(found @ c @ found.T)

    change, value = lowest(
        [ops.convert_to_tensor(gradient)],
        [[ops.convert_to_tensor(v)] for v in directions],
        products,
        0.0,
    )
    return ops.convert_to_numpy(change[0]), float(value)


def test_the_lowest_point_of_the_quadratic_model():
    root, gradient, *directions = numbers(8, 5)[:5], *numbers(3, 5, seed=1)
    c = root @ root.T
    if not WIDE:
        c, gradient = c.astype("float32"), gradient.astype("float32")
    directions = [v.astype(gradient.dtype) for v in directions]
    b = np.stack(directions)
    found, value = lowest_of(gradient, directions, c)
    expected = -b.T @ np.linalg.solve(b @ c @ b.T, b @ gradient)
    np.testing.assert_allclose(found, expected, rtol=1e-9 if WIDE else 1e-3)
    # M(δ) - M(0), which there is ½ ∇hᵀδ.
    m = gradient @ expected + 0.5 * expected @ c @ expected
    np.testing.assert_allclose(value, m, rtol=1e-9 if WIDE else 1e-3)
    np.testing.assert_allclose(value, 0.5 * gradient @ expected, rtol=1e-3)
    # With no second direction, or one that is no other, along the first.
    first = directions[0]
    along = -(gradient @ first) / (first @ c @ first) * first
    for second in ([], [0 * first], [-3 * first]):
        found, _ = lowest_of(gradient, [first, *second], c)
        np.testing.assert_allclose(found, along, rtol=1e-3)
    # Without a gradient to divide, along the last update.
    found, _ = lowest_of(gradient, [0 * first, first], c)
    np.testing.assert_allclose(found, along, rtol=1e-3)
    found, value = lowest_of(0 * gradient, [0 * first, 0 * first], c)
    assert not found.any() and value == 0


@pytest.mark.parametrize("momentum", [True, False])
def test_on_a_quadratic_steps_are_conjugate_gradients(momentum):
    # Of linear regression the diagonal of the curvature is a fixed preconditioner.
    model = network(("linear",), (5, 1))
    x = numbers(20, 5).astype(DTYPE) * [1, 2, 3, 4, 5] + 1
    y = numbers(20, 1, seed=1).astype(DTYPE)
    a = np.concatenate([x, np.ones((20, 1))], axis=1)
    solution = np.linalg.lstsq(a, y, rcond=None)[0]
    mode = {"damping_interval": None, "gamma_interval": None}
    adaptation = Adaptation(momentum=momentum, **mode)
    compiled(model, damping=1e-13, approximation="diagonal", adaptation=adaptation)
    errors = []
    for _ in range(6):
        model.train_on_batch(x, y)
        errors.append(np.abs(np.vstack(model.get_weights()) - solution).max())
    assert errors[4] > 0.01
    # Keras's loss is in float32.
    assert (errors[5] < 1e-4) == momentum


# --- whole steps, against the same ones in NumPy ----------------------------------


def simulated(model, x, y, steps, damping, adaptation, period):
    """θ, λ and γ after each step, for a mean squared error."""
    theta = joined(model.get_weights()).astype("float64")
    eta, t1, t2 = adaptation.l2, adaptation.damping_interval, adaptation.gamma_interval
    gamma, last = np.sqrt(damping + eta), 0 * theta

    def weights(theta):
        return list(zip(*[iter(parted(theta, model))] * 2, strict=True))

    def loss(theta):
        (w, b), (v, c) = weights(theta)
        return np.mean((np.tanh(x @ w + b) @ v + c - y) ** 2)

    def gradient(theta):
        (w, b), (v, c) = weights(theta)
        h = np.tanh(x @ w + b)
        error = 2 * (h @ v + c - y) / y.size
        back = error @ v.T * (1 - h**2)
        return joined([x.T @ back, back.sum(0), h.T @ error, error.sum(0)])

    def inverses(theta, damping):
        (w, b), (v, _) = weights(theta)
        h = np.tanh(x @ w + b)
        of_output = np.eye(2) * 2 / y.shape[1]
        back = v.T * (1 - h**2)[:, None]
        of_hidden = np.einsum("nci,cd,ndj->ij", back, of_output, back) / len(x)
        found = []
        for rows, g in ((x, of_hidden), (h, of_output)):
            a = np.concatenate([rows, np.ones((len(x), 1))], axis=1)
            a = a.T @ a / len(x)
            pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
            root = np.sqrt(damping)
            a, g = a + pi * root * np.eye(len(a)), g + root / pi * np.eye(len(g))
            found.append(np.kron(np.linalg.inv(a), np.linalg.inv(g)))
        return found

    def best(theta, inverses):
        """δ and M(δ) - M(0), from dense matrices."""
        slope = gradient(theta)
        part = x[:: adaptation.subsample]
        c = curvature(weights(theta), TANH, part, "gaussian")
        c = c + (damping + eta) * np.eye(len(c))
        first, second = inverses
        parts = np.split(-slope, [len(first)])
        found = [np.concatenate([first @ parts[0], second @ parts[1]])]
        if adaptation.momentum and last.any():
            found.append(last)
        found = np.stack(found)
        delta = -found.T @ np.linalg.solve(found @ c @ found.T, found @ slope)
        return delta, slope @ delta + 0.5 * delta @ c @ delta

    found = []
    for step in range(steps):
        searched = t2 and step % t2 == 0
        if searched:
            omega = adaptation.decay ** (t2 / 2)
            gammas = [gamma, omega * gamma, gamma / omega]
            gamma = min(gammas, key=lambda g: best(theta, inverses(theta, g**2))[1])
        if searched or step % period == 0 or step < 3:
            held = inverses(theta, gamma**2 if t2 else damping + eta)
        last, value = best(theta, held)
        if t1 and step % t1 == 0:
            rho = (loss(theta + last) - loss(theta)) / value
            (low, high), omega = adaptation.thresholds, adaptation.decay**t1
            damping *= omega if rho > high else 1 if rho >= low else 1 / omega
        theta = theta + last
        found.append((theta, damping, gamma))
    return found


@pytest.mark.parametrize(
    "period, arguments",
    [
        (5, {"damping_interval": 1, "gamma_interval": 2, "l2": 0.01, "decay": 0.5}),
        (1, {"damping_interval": 2, "gamma_interval": None, "l2": 0.1}),
        (1, {"gamma_interval": None, "l2": 0.1, "subsample": 2}),
    ],
    ids=["all", "little", "part"],
)
def test_steps_are_those_of_dense_matrices(period, arguments):
    model, (x, y) = network(), data(seed=2)
    momentum = arguments["gamma_interval"] is not None
    adaptation = Adaptation(momentum=momentum, thresholds=(0.4, 0.8), **arguments)
    expected = simulated(model, x, 3 * y, 7, 0.02, adaptation, period)
    if adaptation.gamma_interval:  # Every rule has been followed.
        _, *both = zip(*expected, strict=True)
        for start, values in zip((0.02, 0.03**0.5), both, strict=True):
            assert set(np.sign(np.diff([start, *values]))) == {-1, 0, 1}
    arguments = {"damping": 0.02, "inverse_update_period": period}
    optimizer = compiled(model, adaptation=adaptation, **arguments)
    for theta, damping, gamma in expected:
        model.train_on_batch(x, 3 * y)
        tol = 1e-5 if WIDE else 0.01
        np.testing.assert_allclose(joined(model.get_weights()), theta, tol, tol)
        np.testing.assert_allclose(float(optimizer.damping), damping, rtol=1e-5)
        if adaptation.gamma_interval:
            np.testing.assert_allclose(optimizer._gamma.numpy(), gamma, rtol=1e-5)


def regression(rate=0.5, l2=0.03):
    """A model whose loss is quadratic in the weights, but for other masks."""
    keras.utils.clear_session(free_memory=False)
    regularizer = keras.regularizers.L2(l2)
    regularizers = {"kernel_regularizer": regularizer, "bias_regularizer": regularizer}
    layers = [keras.layers.Dropout(rate, seed=1), keras.layers.Dense(2, **regularizers)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.layers[-1].kernel.assign(numbers(3, 2))
    return model


def test_the_loss_has_the_masks_of_its_gradient_and_the_regularizers():
    # Then M is the loss, ρ is 1, and λ neither raised nor lowered.
    x, y = (values.astype("float32") for values in data(30))
    model = regression()
    every = {"damping_interval": 1, "gamma_interval": None}
    adaptation = Adaptation(l2=0.06, thresholds=(0.999, 1.001), **every)
    optimizer = compiled(model, damping=1e-6, adaptation=adaptation)
    for _ in range(3):
        before = model.get_weights()
        model.train_on_batch(x, y)
        assert np.abs(model.get_weights()[0] - before[0]).max() > 0.01
        np.testing.assert_allclose(float(optimizer.damping), 1e-6, rtol=1e-6)


# --- in training ------------------------------------------------------------------


@pytest.mark.slow
def test_training_compiled_and_resumed():
    def make(mode):
        keras.utils.clear_session(free_memory=False)
        model = network()
        adaptation = Adaptation(damping_interval=2, gamma_interval=3, subsample=2)
        arguments = {"inverse_update_period": 2, "seed": 0, "damping": 1.0}
        optimizer = KFAC(model, adaptation=adaptation, **arguments)
        return compile_model(model, optimizer, mode)

    batches = [data(seed=seed) for seed in range(5)]
    check_steps(make, batches, (2,))
    model = make(QUICK)
    model.train_on_batch(*batches[0])
    check_lowering(model, batches[0])


def test_the_loss_scale_changes_nothing():
    x, y = (values.astype("float32") for values in data())
    found = []
    for scale in (1.0, 4096.0):
        keras.utils.clear_session(free_memory=False)
        model = keras.Sequential([keras.Input((3,))])
        for size, activation in ((4, "tanh"), (2, None)):
            model.add(keras.layers.Dense(size, activation, dtype="mixed_float16"))
        model.set_weights([numbers(*w.shape) for w in model.get_weights()])
        inner = KFAC(
            model,
            damping=0.1,
            fisher="exact",
            adaptation=Adaptation(gamma_interval=2, damping_interval=1),
        )
        outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=scale)
        model.compile(outer, "mse", **QUICK)
        for _ in range(3):
            model.train_on_batch(x, y)
        found.append([joined(model.get_weights()), float(inner.damping)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("arguments", [{"adaptation": Adaptation()}, {}])
@pytest.mark.parametrize("dtypes", [("bfloat16",) * 2, ("float32", DTYPE)])
def test_weights_of_other_dtypes_have_the_same_steps(dtypes, arguments):
    arguments = arguments or {"norm_constraint": 0.01, "learning_rate": 1.0}
    x, y = (values.astype("float32") for values in data())
    found = []
    for of_layers in (("float32", "float32"), dtypes):
        model = keras.Sequential([keras.Input((3,))])
        for size, activation, dtype in zip((4, 2), TANH, of_layers, strict=True):
            model.add(keras.layers.Dense(size, activation, dtype=dtype))
        model.set_weights([numbers(*w.shape) for w in model.get_weights()])
        compiled(model, **arguments)
        for _ in range(2):
            model.train_on_batch(x, y)
        found.append(joined([w.astype("float32") for w in model.get_weights()]))
    np.testing.assert_allclose(*found, rtol=0.02, atol=0.02)


def test_a_batch_is_forgotten_after_its_step():
    model, (x, y) = network(), data()
    optimizer = compiled(model, adaptation=Adaptation())
    model.train_on_batch(x, y)
    assert optimizer._hidden.objective is None
    with pytest.raises(ValueError, match="Received: gradients alone"):
        optimizer.apply([ops.zeros(v.shape) for v in model.trainable_variables])
    model = network()
    optimizer = compiled(model, "mae", adaptation=Adaptation())
    with pytest.raises(ValueError, match="likelihood is known"):
        model.train_on_batch(x, y)
    assert optimizer._hidden.objective is None


def test_config():
    adaptation = Adaptation(gamma_interval=None, l2=1e-5, bounds=(1e-3, 10))
    config = KFAC(None, adaptation=adaptation).get_config()
    optimizer = KFAC.from_config(json.loads(json.dumps(config)))
    assert optimizer.adaptation.get_config() == adaptation.get_config()
    assert optimizer.adaptation.bounds == (1e-3, 10.0)


def test_the_damping_has_bounds_and_rises_with_losses_that_are_no_numbers():
    adaptation = Adaptation(damping_interval=1, decay=0.5, bounds=(1.0, 16.0))
    for ratio, old, new in [
        (1.0, 8.0, 4.0),
        (0.75, 8.0, 8.0),
        (0.25, 8.0, 8.0),
        (0.2, 8.0, 16.0),
        (np.nan, 4.0, 8.0),
        (-np.inf, 4.0, 8.0),
        (0.0, 16.0, 16.0),
        (1.0, 1.0, 1.0),
    ]:
        assert float(adaptation.damping(old, ops.convert_to_tensor(ratio))) == new
    gammas = Adaptation(gamma_interval=2, decay=0.5, bounds=(1.0, 16.0)).gammas
    np.testing.assert_allclose(gammas(2.0), [2.0, 1.0, 4.0])
    np.testing.assert_allclose(gammas(4.0), [4.0, 2.0, 4.0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"damping_interval": 0},
        {"gamma_interval": 0.5},
        {"l2": -1.0},
        {"subsample": 0},
        {"decay": 0.0},
        {"thresholds": (0.75, 0.25)},
        {"thresholds": (0.25, None)},
        {"bounds": (0.0, 1.0)},
    ],
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=rf"Received: {next(iter(arguments))}="):
        Adaptation(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"norm_constraint": 0.01},
        {"damping": keras.optimizers.schedules.ExponentialDecay(1.0, 2, 0.5)},
        {"weight_decay": 0.1},
        {"global_clipnorm": 1.0},
        {"gradient_accumulation_steps": 2},
        {"adaptation": {}},
    ],
)
def test_what_has_no_part_beside_an_adaptation_is_refused(arguments):
    with pytest.raises(ValueError, match=rf"Received: {next(iter(arguments))}="):
        KFAC(None, **{"adaptation": Adaptation(), **arguments})


def test_replicas_are_refused(monkeypatch):
    two = "kzoo.optimizers.kfac.kfac._reduced"
    monkeypatch.setattr(two, lambda gradients: (gradients, 2))
    model = network()
    compiled(model, adaptation=Adaptation())
    with pytest.raises(ValueError, match="Received: 2 replicas"):
        model.train_on_batch(*data())
