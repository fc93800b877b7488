"""Variance of mini-batch gradients against the batch's size: Flipout's claim.

    python benchmarks/flipout_variance.py [--figure]

A network with normal distributions over its kernels is trained for a few epochs: to
tell the digits apart, or to name the character that follows 16 others in the source of
Python's standard library. Then, for batches of N = 1, 2, 4, ... examples drawn with
replacement, the gradient of the mean cross-entropy by the kernels' means is computed
again and again, each time with new examples and new perturbations, under each estimator
and from the same weights; a line of benchmarks/results/flipout_variance.jsonl has the
variance, averaged over all entries, and its fit

    variance(N) = v / N + c

with bootstrap intervals over the repeats. c is what no batch can average away: the
shared part of the perturbations. Lines that are there are not measured again.
`--figure` draws them all into docs/flipout_variance.png.

Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent Weight
Perturbations on Mini-Batches", 2018, figure 2. https://arxiv.org/abs/1803.04386
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from kzoo.layers import (
    Conv1DFlipout,
    Conv1DLocalReparameterization,
    Conv1DReparameterization,
    Conv2DFlipout,
    Conv2DLocalReparameterization,
    Conv2DReparameterization,
    DenseFlipout,
    DenseLocalReparameterization,
    DenseReparameterization,
    LSTMFlipout,
    LSTMReparameterization,
    MeanFieldNormal,
)
from kzoo.zoo import load, results

RESULTS = Path(__file__).parent / "results" / "flipout_variance.jsonl"
ROOT = Path(__file__).parent.parent
# Dense, convolution of images, of sequences, LSTM.
ESTIMATORS = {
    "flipout": (DenseFlipout, Conv2DFlipout, Conv1DFlipout, LSTMFlipout),
    "shared": (
        DenseReparameterization,
        Conv2DReparameterization,
        Conv1DReparameterization,
        LSTMReparameterization,
    ),
    "local": (
        DenseLocalReparameterization,
        Conv2DLocalReparameterization,
        Conv1DLocalReparameterization,
        None,  # A weight that is held over time cannot be drawn as outputs.
    ),
}
NETWORKS = [(d, k) for d in ("digits", "text") for k in ("dense", "conv", "lstm")]
SIZES = [2**i for i in range(11)]
SEEDS = (0, 1, 2)
STDDEV = 0.05  # σ of every kernel's entry where it starts
EPOCHS, REPEATS = 10, 400
LENGTH, EXAMPLES = 16, 4096  # Of the text: characters that are seen, and examples.


def estimators(kind):
    """The estimators that a kind of network has."""
    return [name for name in ESTIMATORS if kind != "lstm" or name != "local"]


def network(data, kind, estimator, examples):
    """A classifier of digits or of the next character."""
    dense, conv2d, conv1d, lstm = ESTIMATORS[estimator]
    q = MeanFieldNormal(
        loc_initializer="he_normal",
        untransformed_scale_initializer=keras.initializers.Constant(
            np.log(np.expm1(STDDEV))
        ),
    )
    options = {"kernel_posterior_fn": q, "num_examples": examples}
    conv_options = {"padding": "same", "activation": "relu", **options}
    if data == "digits":
        first = [keras.Input((8, 8, 1)), keras.layers.Rescaling(1 / 16)]
        conv, rows, classes = conv2d, [keras.layers.Reshape((8, 8))], 10
    else:
        first = [keras.Input((LENGTH,), dtype="int32"), OneHot()]
        conv, rows, classes = conv1d, [], 128
    body = {
        "dense": lambda: [
            keras.layers.Flatten(),
            dense(128, "relu", **options),
            dense(128, "relu", **options),
        ],
        "conv": lambda: [
            conv(16, 3, **conv_options),
            conv(32, 3, strides=2, **conv_options),
            keras.layers.Flatten(),
        ],
        "lstm": lambda: [
            *rows,
            lstm(64, recurrent_kernel_posterior_fn=q, **options),
        ],
    }[kind]()
    return keras.Sequential([*first, *body, dense(classes, **options)])


class OneHot(keras.layers.Layer):
    """The 128 characters of ASCII as rows of the unit matrix."""

    def call(self, ids):
        return keras.ops.one_hot(ids, 128, dtype=self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (*input_shape, 128)


def examples(data):
    """The training examples `(x, y)`."""
    folder = ROOT / "runs" / "data"
    if data == "digits":
        dataset, _ = load("digits", "train", data_dir=folder)
        x, y = (np.array(a) for a in zip(*dataset.as_numpy_iterator(), strict=True))
        return x.astype("float32"), y
    dataset, _ = load("python_source", "train", data_dir=folder, as_supervised=False)
    text = b"".join(example["text"] for example in dataset.as_numpy_iterator())
    text = np.frombuffer(text, "uint8")
    text = text[text < 128].astype("int32")
    starts = np.random.default_rng(0).integers(0, len(text) - LENGTH, EXAMPLES)
    rows = text[starts[:, None] + np.arange(LENGTH + 1)]
    return rows[:, :-1], rows[:, -1]


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
SETTINGS = {
    "backend": keras.backend.backend(),
    "dtype": "float32",
    "stddev_at_the_start": STDDEV,
    "epochs": EPOCHS,
    "repeats": REPEATS,
    "sizes": SIZES,
}


def deviations(model, x, y, seed):
    """Squared deviations of the gradient by the kernels' means, [sizes, repeats].

    Each is the mean over the entries, so scaled that the mean over the repeats is the
    variance.
    """
    kernels = [
        v.value
        for v in model.trainable_weights
        if v.path.endswith("kernel_posterior_loc")  # Of recurrent kernels too.
    ]
    x, y = tf.constant(x), tf.constant(y)

    @tf.function(jit_compile=True)
    def gradient(rows):
        with tf.GradientTape() as tape:
            loss = LOSS(tf.gather(y, rows), model(tf.gather(x, rows), training=True))
        return tf.concat([tf.reshape(g, [-1]) for g in tape.gradient(loss, kernels)], 0)

    numbers = np.random.default_rng(seed)
    found = []
    for size in SIZES:
        gradients = [
            gradient(tf.constant(numbers.integers(0, len(x), size))).numpy()
            for _ in range(REPEATS)
        ]
        gradients = np.stack(gradients).astype("float64")
        squares = (gradients - gradients.mean(0)) ** 2
        found.append(squares.mean(1) * REPEATS / (REPEATS - 1))
    return np.array(found)


def fit(variance):
    """v and c of v / N + c, by least squares of the relative errors."""
    design = np.stack([1 / np.array(SIZES), np.ones(len(SIZES))], 1)
    return np.linalg.lstsq(design / variance[:, None], np.ones(len(SIZES)), rcond=None)[
        0
    ]


def slope(variance, sizes):
    """The slope of log variance by log N over some sizes."""
    return np.polyfit(np.log(np.array(SIZES)[sizes]), np.log(variance[sizes]), 1)[0]


def summary(squares):
    """Figures of each estimator, with 90 % intervals over the repeats.

    Args:
        squares: dict of what `deviations` returned.
    """
    numbers = np.random.default_rng(0)
    variance = {name: found.mean(1) for name, found in squares.items()}
    v, c = {}, {}
    for name in squares:
        v[name], c[name] = fit(variance[name])
    # Where v / N is at least 20 times Flipout's c: its own part is below 5 %.
    flat = v["flipout"] / np.array(SIZES) >= 20 * abs(c["flipout"])
    chosen = flat if flat.sum() >= 3 else np.arange(len(SIZES)) < 3
    drawn = {"c_of_shared": [], "slope": []}
    for _ in range(1000):
        again = {
            name: np.stack([numbers.choice(row, REPEATS).mean() for row in found])
            for name, found in squares.items()
            if name != "local"
        }
        drawn["slope"].append(slope(again["flipout"], chosen))
        drawn["c_of_shared"].append(fit(again["flipout"])[1] / fit(again["shared"])[1])
    figures = {
        "slope": slope(variance["flipout"], chosen),
        "c_of_shared": c["flipout"] / c["shared"],
    }
    return {
        **{name: float(value) for name, value in figures.items()},
        **{
            f"{n}_interval": np.percentile(d, [5, 95]).tolist()
            for n, d in drawn.items()
        },
        "slope_over_sizes": np.array(SIZES)[chosen].tolist(),
        **{
            name: {
                "variance": variance[name].tolist(),
                "v": float(v[name]),
                "c": float(c[name]),
            }
            for name in squares
        },
    }


def measure():
    """Measures what is not there yet."""
    done = [
        (r["data"], r["network"], r["seed"])
        for r in results.read(RESULTS)
        if all(r.get(name) == value for name, value in SETTINGS.items())
    ]
    wanted = [(d, k, s) for d, k in NETWORKS for s in SEEDS]
    left = [
        key
        for key in wanted
        if (f"{key[0]}, train, with replacement", *key[1:]) not in done
    ]
    for data, kind, seed in tqdm(left, desc="networks"):
        x, y = examples(data)
        keras.utils.set_random_seed(seed)
        trained = network(data, kind, "flipout", len(x))
        trained.compile("adam", LOSS)
        trained.fit(x, y, batch_size=64, epochs=EPOCHS, verbose=0)
        layers = [w for w in trained.layers if hasattr(w, "kernel_posterior")]
        stddev = np.mean([w.kernel_posterior.stddev().numpy().mean() for w in layers])
        squares = {}
        for estimator in estimators(kind):
            model = network(data, kind, estimator, len(x))
            model.set_weights(trained.get_weights())
            squares[estimator] = deviations(model, x, y, seed)
        results.append(
            RESULTS,
            {
                "command": "python benchmarks/flipout_variance.py",
                "data": f"{data}, train, with replacement",
                "network": kind,
                "seed": seed,
                **SETTINGS,
                "shape": " -> ".join(
                    str(tuple(w.kernel_posterior.mean().shape)) for w in layers
                ),
                "stddev": float(stddev),
                **summary(squares),
            },
        )


def table():
    """Prints each line's figures against the bars; returns whether all are met."""
    met = True
    for r in results.read(RESULTS):
        fine = abs(r["slope"] + 1) <= 0.05 and r["c_of_shared"] <= 0.1
        met &= fine
        low, high = r["slope_interval"]
        least, most = r["c_of_shared_interval"]
        print(
            f"{r['data'].partition(',')[0]:6s} {r['network']:5s} seed {r['seed']}  "
            f"sigma {r['stddev']:.3f}  "
            f"slope {r['slope']:.3f} [{low:.3f}, {high:.3f}] (bar -1 +- 0.05)  "
            f"c / c of a shared perturbation {r['c_of_shared']:.4f} "
            f"[{least:.4f}, {most:.4f}] (bar 0.1)  {'met' if fine else 'MISSED'}"
        )
    return met


def figure(path=ROOT / "docs" / "flipout_variance.png"):
    """Draws the variances of all lines."""
    from matplotlib.figure import Figure

    lines = {}
    for r in results.read(RESULTS):
        kind = r["data"].partition(",")[0], r["network"]
        lines.setdefault(kind, []).append(r)
    rows = -(-len(lines) // 3)
    drawn = Figure((13.5, 3.6 * rows), layout="constrained")
    panels = drawn.subplots(rows, 3, squeeze=False).flat
    for axes, ((data, kind), of_kind) in zip(panels, lines.items(), strict=False):
        for estimator, color in zip(ESTIMATORS, ("C0", "C3", "C2"), strict=True):
            if estimator not in estimators(kind):
                continue
            found = [r[estimator]["variance"] for r in of_kind]
            mean = np.exp(np.log(found).mean(0))
            axes.plot(SIZES, mean, "o-", color=color, markersize=3, label=estimator)
            axes.fill_between(
                SIZES, np.min(found, 0), np.max(found, 0), color=color, alpha=0.2
            )
            if estimator == "flipout":
                axes.plot(SIZES, mean[0] / np.array(SIZES), ":", color="grey")
        axes.set(xscale="log", yscale="log", title=f"{kind}, {data}")
        axes.set(xlabel="N, batch size", ylabel="variance of the gradient")
        axes.legend()
    drawn.savefig(path, dpi=120)


def main(argv=None):
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--figure", action="store_true")
    arguments = parser.parse_args(argv)
    measure()
    met = table()
    if arguments.figure:
        figure()
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
