"""The members of a BatchEnsemble layer, each written out as a plain Keras layer."""

import keras
import numpy as np
from keras import ops

from .backends import compiled, gradients

M, B = 3, 2
DTYPE = "float64" if keras.backend.backend() == "tensorflow" else "float32"
TOL = 1e-10 if DTYPE == "float64" else 2e-4


def values(tensor):
    """A tensor or variable in NumPy."""
    return np.asarray(ops.convert_to_numpy(tensor))


def normal(*shape, seed=0):
    """Normal numbers, in the dtype that the tests compare in."""
    return np.random.default_rng(seed).normal(size=shape).astype(DTYPE)


def randomized(layer, shape):
    """The layer, built for the shape, with random weights."""
    if not layer.built:
        layer.build(shape)
    for i, weight in enumerate(layer.weights):
        weight.assign(normal(*weight.shape, seed=i + 1))
    return layer


def quick(function):
    """The function, compiled on JAX, which else compiles each operation by itself."""
    return compiled(function) if keras.backend.backend() == "jax" else function


def called(layer, **kwargs):
    """The layer as a function of its inputs and its trainable weights."""
    fixed = [values(v) for v in layer.non_trainable_variables]
    return quick(lambda x, *w: layer.stateless_call(w, fixed, x, **kwargs)[0])


def written_out(layer, plain, scaled):
    """What the layer should be: a function of inputs and trainable weights.

    Args:
        layer: The layer, built; of rank K.
        plain: A plain Keras layer, built, of the same arguments but the activation.
        scaled: Function of the list of shared kernels W, and of one member's r and s,
            that returns the kernels W ∘ (r sᵀ). The K maps that these make are summed.
    """
    names = [variable.name for variable in layer.trainable_variables]
    activation = getattr(layer, "activation", lambda y: y)

    def function(x, *weights):
        given = dict(zip(names, weights, strict=True))
        fast = [given.pop("alpha"), given.pop("gamma")]
        if layer.rank == 1:
            fast = [w[None] for w in fast]
        bias, shared = given.pop("bias", None), list(given.values())
        outputs = []
        for m, rows in enumerate(ops.split(x, layer.ensemble_size)):
            y = 0
            for k in range(layer.rank):
                own = scaled(shared, *(w[k, m] for w in fast))
                if bias is not None:
                    own = [*own, bias[m] * (k == 0)]
                y = y + plain.stateless_call(own, [], rows)[0]
            outputs.append(y)
        return activation(ops.concatenate(outputs))

    return quick(function)


def of_channels(shared, r, s):
    """W ∘ (r sᵀ) of a convolution, whose filters each read a group of channels."""
    (kernel,) = shared
    groups, filters = r.shape[0] // kernel.shape[-2], s.shape[0]
    r = ops.repeat(ops.reshape(r, (groups, -1)), filters // groups, axis=0)
    return [kernel * ops.transpose(r) * s]


def each_on_its_own(layer, plain, mask=None, **kwargs):
    """Likewise of a layer whose weights are all the members' own, `[M, ...]`."""
    fixed = [values(v) for v in layer.non_trainable_variables]

    def function(x, *weights):
        outputs = []
        for m, rows in enumerate(ops.split(x, layer.ensemble_size)):
            if mask is not None:
                kwargs["mask"] = np.split(mask, layer.ensemble_size)[m]
            own = [w[m] for w in weights], [w[m] for w in fixed]
            outputs.append(plain.stateless_call(*own, rows, **kwargs)[0])
        return ops.concatenate(outputs)

    return quick(function)


def arguments(layer, x):
    """What the functions above take: inputs and the values of the weights."""
    return [x, *(values(v.value) for v in layer.trainable_variables)]


def check_equal(layer, function, x, **kwargs):
    """Requires a layer's outputs and its gradients to be a function's."""
    given, own = arguments(layer, x), called(layer, **kwargs)
    output = own(*given)
    assert tuple(output.shape) == layer.compute_output_shape(x.shape)
    np.testing.assert_allclose(values(output), values(function(*given)), TOL, TOL)
    mine, theirs = gradients_of(own, given), gradients_of(function, given)
    for one, other in zip(mine, theirs, strict=True):
        # Sums of numbers of either sign, so rounded as their largest are.
        np.testing.assert_allclose(one, other, TOL, TOL * max(1, np.abs(other).max()))
        assert (one != 0).any()


def gradients_of(function, given):
    """Gradients of the sum of the outputs' squares, by all that is a float."""
    x, *weights = given
    if x.dtype.kind == "i":
        return gradients(lambda *w: ops.sum(function(x, *w) ** 2), *weights)
    return gradients(lambda x, *w: ops.sum(function(x, *w) ** 2), x, *weights)


def check_isolated(layer, x, other, **kwargs):
    """Requires members to see their own rows alone, and weights their own member's.

    Args:
        layer: The layer, built.
        x: Inputs of M members.
        other: Other inputs.
        **kwargs: Further arguments of the call.
    """
    size, function = layer.ensemble_size, called(layer, **kwargs)
    axes = dict.fromkeys(("alpha", "gamma", "beta", "bias"), 0)
    if getattr(layer, "rank", 1) > 1:
        axes |= {"alpha": 1, "gamma": 1}

    def seen(x):
        """Outputs and gradients, by members; those of what is shared are left out."""
        given = arguments(layer, x)
        found = gradients_of(function, given)
        names = [v.name for v in layer.trainable_variables]
        if len(found) > len(names):
            names = ["x", *names]
        found = [
            np.moveaxis(gradient, axes.get(name, 0), 0)
            for name, gradient in zip(names, found, strict=True)
            if name in ("x", *axes)
        ]
        found = [values(function(*given)), *found]
        return [a.reshape(size, -1) for a in found]

    before = seen(x)
    for m in range(size):
        mixed = x.copy()
        part = slice(m * len(x) // size, (m + 1) * len(x) // size)
        mixed[part] = other[part]
        for old, new in zip(before, seen(mixed), strict=True):
            np.testing.assert_array_equal(
                (old != new).any(1), np.arange(size) == m, strict=True
            )


def check_ones(layer, plain, x, own):
    """Requires r = s = 1 to be the plain layer, and the number of weights as such.

    Args:
        layer: The layer, not built, of rank 1; r and s start as ones.
        plain: A plain layer of the same arguments, not built.
        x: Inputs of M members.
        own: The number of weights that each member has of its own.
    """
    randomized(plain, x.shape)
    layer.build(x.shape)
    bias = getattr(plain, "bias", None)
    for mine, its in zip(layer.shared.weights, plain.weights, strict=False):
        mine.assign(its)
    if bias is not None:
        layer.bias.assign(np.stack([values(bias)] * layer.ensemble_size))
    np.testing.assert_allclose(values(layer(x)), values(plain(x)), TOL, TOL)
    shared = plain.count_params() - (0 if bias is None else values(bias).size)
    assert layer.count_params() == shared + layer.ensemble_size * own


def check_rank(one, three, x):
    """Requires rank 3 with r = 0 but for the first to be rank 1.

    Args:
        one: A built layer of rank 1.
        three: One of rank 3, else alike.
        x: Inputs.
    """
    for mine, its in zip(three.shared.weights, one.shared.weights, strict=True):
        mine.assign(its)
    if getattr(one, "bias", None) is not None:
        three.bias.assign(one.bias)
    alpha, gamma = values(one.alpha), values(one.gamma)
    three.alpha.assign(np.stack([alpha, 0 * alpha, 0 * alpha]))
    three.gamma.assign(np.stack([gamma, normal(*gamma.shape), gamma]))
    np.testing.assert_allclose(values(three(x)), values(one(x)), TOL, TOL)
