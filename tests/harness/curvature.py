"""The exact curvature of a small network, from each example's Jacobian, in NumPy."""

import keras
import numpy as np
from keras import ops

from kzoo.layers.ops.gradient import gradients

ACTIVATIONS = {
    "linear": (lambda s: s, lambda s: np.ones_like(s)),
    "tanh": (np.tanh, lambda s: 1 - np.tanh(s) ** 2),
}


def curvatures(weights, activations, x, likelihood):
    """The curvature of the mean loss, one matrix a layer of dense ones.

    Args:
        weights: Pairs of a kernel and a bias, of each layer.
        activations: The name of each layer's activation; the last one is linear.
        x: Inputs, one row an example.
        likelihood: `"categorical"` (logits), `"bernoulli"` (logits) or `"gaussian"`, of
            a loss that averages over the last axis as Keras's does.

    Returns:
        A matrix for each layer, of the kernel with the bias as its last row, row by
        row: `[(n + 1) m, (n + 1) m]`.
    """
    jacobians, of_output = _of_outputs(weights, activations, x, likelihood)
    return [np.einsum("nca,ncd,ndb->ab", j, of_output, j) / len(x) for j in jacobians]


def curvature(weights, activations, x, likelihood):
    """The curvature of the mean loss by the weights of all layers, as one matrix.

    What `curvatures` returns are its blocks.
    """
    jacobians, of_output = _of_outputs(weights, activations, x, likelihood)
    j = np.concatenate(jacobians, axis=-1)
    return np.einsum("nca,ncd,ndb->ab", j, of_output, j) / len(x)


def _of_outputs(weights, activations, x, likelihood):
    """Each example's Jacobian of a layer's weights, and curvature by the outputs."""
    rows, slopes, h = [], [], x.astype("float64")
    for (kernel, bias), name in zip(weights, activations, strict=True):
        value, slope = ACTIVATIONS[name]
        a = np.concatenate([h, np.ones((len(h), 1))], axis=1)
        s = a @ np.concatenate([kernel, bias[None]])
        rows.append(a)
        slopes.append(slope(s))
        h = value(s)
    outputs, size = h, h.shape[1]
    p = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    q = 1 / (1 + np.exp(-outputs))
    of_output = {
        "categorical": [np.diag(r) - np.outer(r, r) for r in p],
        "bernoulli": [np.diag(r * (1 - r)) / size for r in q],
        "gaussian": [np.eye(size) * 2 / size] * len(x),
    }[likelihood]
    of_s = [np.stack([np.diag(slope) for slope in slopes[-1]])]
    for (kernel, _), slope in zip(weights[:0:-1], slopes[-2::-1], strict=True):
        of_s.append(of_s[-1] @ kernel.T * slope[:, None, :])
    jacobians = [
        (a[:, None, :, None] * j[:, :, None, :]).reshape(len(x), size, -1)
        for a, j in zip(rows, of_s[::-1], strict=True)
    ]
    return jacobians, np.stack(of_output)


def of_one_example(model, x, part):
    """The curvature of a mean squared error of one example, from autodiff's Jacobian.

    Args:
        model: A model with one output, `[1, D]`.
        x: The example, as the model takes it.
        part: A part of a KFAC optimizer's curvature.

    Returns:
        A matrix for each of the part's matrices, of its weights row by row:
        `[..., n m, n m]`.
    """
    trainable = {id(v): ops.convert_to_tensor(v) for v in model.trainable_variables}
    other = [ops.convert_to_tensor(v) for v in model.non_trainable_variables]
    keys = [id(variable) for variable in part.variables]
    size = model.output_shape[-1]
    total = 0.0
    for c in range(size):

        def output(*values, c=c):
            weights = {**trainable, **dict(zip(keys, values, strict=True))}
            y, _ = model.stateless_call(list(weights.values()), other, x, training=True)
            return y[0, c]

        found = gradients(output, [trainable[key] for key in keys])
        w = ops.convert_to_numpy(part.block.join(found)).astype("float64")
        w = w.reshape(*w.shape[:-2], -1)
        total = total + 2 / size * w[..., :, None] * w[..., None, :]
    return total


def observed(model, x, **arguments):
    """The parts of a KFAC that has seen a batch, with a mean squared error."""
    from kzoo.optimizers import KFAC

    optimizer = KFAC(model, **{"fisher": "exact", "seed": 0, **arguments})
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    optimizer.observe(keras.tree.map_structure(ops.convert_to_tensor, x))
    return [
        (part, [v.numpy().astype("float64") for v in part.factors])
        for part in optimizer._hidden.parts
    ]


def check_same_step(one, other):
    """Checks that a step changed a network's outputs, and another's as much.

    Args:
        one: Outputs before and after the step.
        other: Those of the same network, with other coordinates somewhere inside of it.
    """
    (start, end), (other_start, other_end) = one, other
    np.testing.assert_allclose(start, other_start, rtol=1e-9, atol=1e-9)
    assert np.abs(end - start).max() > 0.01
    np.testing.assert_allclose(end, other_end, rtol=1e-4, atol=1e-5)
