"""Parts of networks written out in NumPy, to compare the zoo's models with."""

import keras
import numpy as np


def value(x):
    """A tensor's or variable's numbers, in double precision."""
    return keras.ops.convert_to_numpy(x).astype("float64")


def softmax(x):
    """Probabilities of logits."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def randomize(model, seed=0):
    """Gives every weight, batch statistics too, values that show its effect.

    Sums have both signs, or a ReLU behind them would do nothing.
    """
    rng = np.random.default_rng(seed)
    for v in model.weights:
        low = 0.5 if "variance" in v.path or "gamma" in v.path else -0.5
        if v.path.endswith("kernel"):
            v.assign(rng.normal(size=v.shape) * (2 / np.prod(v.shape[:-1])) ** 0.5)
        else:
            v.assign(rng.uniform(low, 1.0, v.shape))


def conv2d(x, kernel, strides=1):
    """A convolution with SAME padding."""
    size, (b, h, w, _) = kernel.shape[0], x.shape
    out = -(-h // strides), -(-w // strides)
    pad = [
        max((o - 1) * strides + size - n, 0) for o, n in zip(out, (h, w), strict=True)
    ]
    x = np.pad(x, [(0, 0), *((p // 2, p - p // 2) for p in pad), (0, 0)])
    y = np.zeros((b, *out, kernel.shape[-1]))
    for i in range(out[0]):
        for j in range(out[1]):
            r, c = i * strides, j * strides
            patch = x[:, r : r + size, c : c + size]
            y[:, i, j] = np.einsum("bhwc,hwco->bo", patch, kernel)
    return y


def batch_norm(x, layer, epsilon):
    """What batch normalization gives outside training."""
    gamma, beta, mean, variance = map(value, layer.weights)
    return gamma * (x - mean) / np.sqrt(variance + epsilon) + beta


def relu(x):
    """The positive part."""
    return np.maximum(x, 0)
