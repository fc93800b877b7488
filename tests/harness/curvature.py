"""The exact curvature of a small network, from each example's Jacobian, in NumPy."""

import numpy as np

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
    found = []
    for layer in range(len(weights)):
        total = 0.0
        for n in range(len(x)):
            jacobian = np.diag(slopes[-1][n])  # Of the outputs by s of a layer.
            for later in range(len(weights) - 1, layer, -1):
                w = weights[later][0]
                jacobian = jacobian @ w.T @ np.diag(slopes[later - 1][n])
            of_s = jacobian.T @ of_output[n] @ jacobian
            a = rows[layer][n]
            total = total + np.kron(np.outer(a, a), of_s)
        found.append(total / len(x))
    return found
