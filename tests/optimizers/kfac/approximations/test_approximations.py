import keras
import numpy as np
import pytest
from keras import ops

from harness.curvature import curvatures
from kzoo.optimizers import KFAC

DTYPE = "float64" if keras.backend.backend() == "tensorflow" else "float32"
TOL = 1e-8 if DTYPE == "float64" else 1e-3


def mlp():
    rng = np.random.default_rng(3)
    model = keras.Sequential(
        [
            keras.Input((3,), dtype=DTYPE),
            keras.layers.Dense(3, "tanh", dtype=DTYPE),
            keras.layers.Dense(2, dtype=DTYPE),
        ]
    )
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    return model


def prepared(model, x, **arguments):
    optimizer = KFAC(model, fisher="exact", seed=0, factor_decay=0.0, **arguments)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    optimizer.build(model.trainable_variables)
    for _ in range(2):  # The second time in the basis that the first one gave.
        optimizer.observe(ops.convert_to_tensor(x))
        optimizer._refresh()
    return optimizer


def exact(model, x):
    weights = [w.astype("float64") for w in model.get_weights()]
    pairs = list(zip(weights[::2], weights[1::2], strict=True))
    return curvatures(pairs, ["tanh", "linear"], x, "categorical")


def numbers(variables):
    return [v.numpy().astype("float64") for v in variables]


X = np.random.default_rng(0).normal(size=(6, 3)).astype(DTYPE)


def test_eigenvalues_are_the_diagonal_of_the_exact_curvature_in_the_basis():
    model = mlp()
    optimizer = prepared(model, X, approximation="ekfac")
    for part, expected in zip(optimizer._hidden.parts, exact(model, X), strict=True):
        a, g, s = numbers(part.factors)
        basis = np.kron(*numbers(part.caches))
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-5)
        diagonal = np.diag(basis.T @ expected @ basis)
        np.testing.assert_allclose(s.ravel(), diagonal, rtol=TOL, atol=TOL)
        # So it is nearer to the exact one than the Kronecker product of A and G.
        corrected = basis @ np.diag(s.ravel()) @ basis.T
        product = np.kron(a, g)
        near, far = (np.linalg.norm(expected - m) for m in (corrected, product))
        assert near < 0.98 * far


def test_with_the_eigenvalues_of_a_and_g_it_is_k_fac_with_plain_damping():
    # A ⊗ G + λ I, of which factored damping is an approximation.
    model = mlp()
    optimizer = prepared(model, X, approximation="ekfac")
    part = optimizer._hidden.parts[0]
    a, g, _ = numbers(part.factors)
    state = [ops.convert_to_tensor(v.numpy()) for v in part.factors]
    bases = [ops.zeros(v.shape, DTYPE) for v in part.caches]
    state, bases = part.approximation.refresh(state, bases, 0.1)
    v = np.random.default_rng(1).normal(size=(4, 3))
    found = part.approximation.precondition(
        ops.convert_to_tensor(v.astype(DTYPE)), state, bases, 0.1
    )
    expected = np.linalg.solve(np.kron(a, g) + 0.1 * np.eye(12), v.ravel())
    np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-4, atol=1e-5)


def test_a_change_of_basis_takes_the_eigenvalues_over():
    # What is diagonal in both bases stays as it is: here they differ in order and sign.
    part = prepared(mlp(), X, approximation="ekfac")._hidden.parts[0]
    factors = [ops.convert_to_tensor(v.numpy()) for v in part.factors]
    bases = [ops.convert_to_tensor(v.numpy()) for v in part.caches]
    flipped = [ops.flip(bases[0], axis=1), -bases[1]]
    given = [*factors[:2], ops.flip(factors[2], axis=0)]
    (_, _, s), _ = part.approximation.refresh(given, flipped, 0.1)
    np.testing.assert_allclose(s, factors[2], rtol=1e-4, atol=1e-5)
    # Of any other basis, the diagonal in the new one of what S was in the old one.
    rng = np.random.default_rng(2)
    old = [np.linalg.qr(rng.normal(size=v.shape))[0].astype(DTYPE) for v in bases]
    old = [ops.convert_to_tensor(v) for v in old]
    (_, _, s), new = part.approximation.refresh(factors, old, 0.1)
    before, after = (np.kron(*map(ops.convert_to_numpy, v)) for v in (old, new))
    curvature = before * np.ravel(factors[2]) @ before.T
    expected = np.diag(after.T @ curvature @ after)
    np.testing.assert_allclose(np.ravel(s), expected, rtol=1e-4, atol=1e-5)


def test_a_diagonal_is_that_of_the_exact_curvature():
    model = mlp()
    optimizer = prepared(model, X, approximation="diagonal")
    for part, expected in zip(optimizer._hidden.parts, exact(model, X), strict=True):
        (d,) = numbers(part.factors)
        np.testing.assert_allclose(d.ravel(), np.diag(expected), rtol=TOL, atol=TOL)
        v = np.random.default_rng(1).normal(size=d.shape)
        found = part.approximation.precondition(
            ops.convert_to_tensor(v.astype(DTYPE)), [ops.convert_to_tensor(d)], [], 0.1
        )
        np.testing.assert_allclose(found, v / (d + 0.1), rtol=1e-4)


# --- positions --------------------------------------------------------------------


def positions(sharing, x, pooled, approximation="kronecker", mask=None):
    """The first layer's factors, of a linear network that pools positions or not."""
    inputs = keras.Input(x.shape[1:], dtype=DTYPE)
    h = inputs
    if mask is not None:
        h = keras.layers.Masking(dtype=DTYPE)(h)
    first = keras.layers.Dense(2, dtype=DTYPE)
    y = first(h)
    if pooled:
        y = keras.layers.Lambda(lambda y: ops.mean(y, axis=1), dtype=DTYPE)(y)
    last = keras.layers.Dense(2, dtype=DTYPE)
    model = keras.Model(inputs, last(y))
    rng = np.random.default_rng(3)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    optimizer = KFAC(
        model, fisher="exact", seed=0, sharing=sharing, approximation=approximation
    )
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    optimizer.observe(ops.convert_to_tensor(x))
    of_g = last.get_weights()[0].astype("float64")
    return numbers(optimizer._hidden.parts[0].factors), of_g @ of_g.T


SEQUENCES = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(DTYPE)


def test_reduce_is_exact_where_positions_are_averaged():
    (a, g), of_g = positions("reduce", SEQUENCES, pooled=True)
    mean = np.concatenate([SEQUENCES.mean(1), np.ones((4, 1))], 1)
    expected = np.kron(mean.T @ mean / 4, of_g)  # 2/D = 1.
    np.testing.assert_allclose(np.kron(a, g), expected, rtol=TOL, atol=TOL)
    (a, g), _ = positions("expand", SEQUENCES, pooled=True)
    assert np.abs(np.kron(a, g) - expected).max() > 0.01


def test_expand_is_exact_where_each_position_has_a_loss():
    (a, g), of_g = positions("expand", SEQUENCES, pooled=False)
    rows = np.concatenate([SEQUENCES, np.ones((4, 3, 1))], -1).reshape(12, 3)
    expected = np.kron(rows.T @ rows / 12, of_g)
    np.testing.assert_allclose(np.kron(a, g), expected, rtol=TOL, atol=TOL)
    (a, g), _ = positions("reduce", SEQUENCES, pooled=False)
    assert np.abs(np.kron(a, g) - expected).max() > 0.01


def test_of_one_position_both_are_the_same():
    found = [positions(s, SEQUENCES[:, :1], True)[0] for s in ("expand", "reduce")]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_masked_positions_do_not_count(sharing):
    x = SEQUENCES.copy()
    x[0, 1:] = 0
    x[2, 2] = 0
    (a, _), _ = positions(sharing, x, pooled=True, mask=True)
    there = (x != 0).any(-1)
    ones = np.concatenate([x, np.ones((4, 3, 1))], -1) * there[..., None]
    if sharing == "expand":
        rows = ones[there]
    else:
        rows = ones.sum(1) / there.sum(1, keepdims=True)
    np.testing.assert_allclose(a, rows.T @ rows / len(rows), rtol=1e-5)


def test_an_example_has_one_gradient_of_all_its_positions():
    # D of the pooled network: its examples' gradients are those of the mean.
    (d,), of_g = positions("expand", SEQUENCES, True, approximation="diagonal")
    mean = np.concatenate([SEQUENCES.mean(1), np.ones((4, 1))], 1)
    expected = np.mean(mean**2, 0)[:, None] * np.diag(of_g)
    np.testing.assert_allclose(d, expected, rtol=TOL + 1e-5)
