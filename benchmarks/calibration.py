"""Calibration of Flipout networks, and of what they compete with.

    python benchmarks/calibration.py [TASK/METHOD] [--figure]

On the digits (LeNet-5) and the diabetes data (a perceptron that predicts mean and
variance), Flipout against the same network trained plainly, with dropout that stays on
at test (MC dropout), and an ensemble of five plain networks. Flipout stands twice: with
the divergence as it is, its prior tuned, and with the divergence times a temperature,
which is tuned (a "cold posterior", added when the first had underfitted the validation
split; its prior is the model's own). Each method has a grid of four settings and the
same number of epochs; the setting with the least negative log-likelihood on the
validation split, over two seeds (over one for the ensemble, which are five networks),
is trained from five other seeds, and only those see the test split. On the diabetes
data each training keeps the weights of its best epoch on the validation split.

Figures of the digits are `kzoo.zoo.metrics`'s. Of the diabetes data, `nll` is of the
mixture of all members' normal distributions, and `calibration` the mean over levels
p = 0.1, ... 0.9 of |p - share of targets below the p-quantile| (Kuleshov, Fenner,
Ermon, "Accurate Uncertainties for Deep Learning Using Calibrated Regression", 2018.
https://arxiv.org/abs/1807.00263). Out of distribution: mean predictive entropy of the
test digits turned by some degrees, or with normal noise added.

Each line of benchmarks/results/calibration.jsonl is one training; lines that are there
are not measured again. Trainings with other epochs or seeds than the script's are not
recorded. `--figure` draws docs/calibration.png from the lines.
"""

import argparse
import fnmatch
import itertools
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from scipy import ndimage, special, stats
from tqdm import tqdm

from kzoo.layers import PosteriorSamples
from kzoo.zoo import build, info, load, metrics, results
from kzoo.zoo.losses import (
    GaussianNegativeLogLikelihood,
    gaussian_negative_log_likelihood,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "calibration.jsonl"
DRAWS, MEMBERS = 32, 5
SEARCH_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
RATES = (2e-3, 1e-2)
# task -> (plain model, Flipout model, epochs, whether the weights of the epoch with the
# least validation NLL are kept: without that, a network that predicts variances
# overfits the few patients without bounds)
TASKS = {
    "digits": ("lenet5_digits", "lenet5_flipout_digits", 200, False),
    "diabetes": ("mlp_regressor", "mlp_regressor_flipout", 100, True),
}
# method -> its own setting and the values tried, each with each learning rate
METHODS = {
    "plain": ("weight_decay", (1e-4, 1e-1)),
    "dropout": ("rate", (0.1, 0.3)),
    "ensemble": ("weight_decay", (1e-4, 1e-1)),
    "flipout": ("prior_stddev", (0.3, 1.0)),
    "cold_flipout": ("temperature", (0.01, 0.1)),
}
ANGLES = tuple(range(0, 91, 15))
NOISES = (0, 1, 2, 4, 8)  # standard deviations, in grey levels of 0 to 16


def arrays(task, split):
    """The inputs and targets of a split."""
    examples, _ = load(task, split, data_dir=ROOT / "runs" / "data")
    x, y = (np.array(a) for a in zip(*examples.as_numpy_iterator(), strict=True))
    return x.astype("float32"), y


def with_dropout(layer, rate):
    """A factory of layers in front of which dropout stands, if they are not first."""

    def make(*args, **kwargs):
        if kwargs["name"] == "hidden0":
            return layer(*args, **kwargs)
        return lambda x: layer(*args, **kwargs)(keras.layers.Dropout(rate)(x))

    return make


def network(task, method, setting):
    """The network of a method, not trained."""
    plain, flipout, *_ = TASKS[task]
    if method == "flipout":
        return build(flipout, prior_stddev=setting)
    if method == "cold_flipout":
        # As if every example had been seen 1 / temperature times.
        return build(flipout, num_examples=len(arrays(task, "train")[0]) / setting)
    # Kernels start as the means of Flipout's do.
    start = {"kernel_initializer": "he_normal"}
    factories = {"dense": partial(keras.layers.Dense, **start)}
    if task == "digits":
        factories["conv"] = partial(keras.layers.Conv2D, **start)
    if method == "dropout":
        # In front of the dense layers, as LeNet-5's with dropout have it.
        factories["dense"] = with_dropout(factories["dense"], setting)
    return build(plain, **factories)


def trained(task, method, setting, rate, seed, epochs):
    """A network, trained."""
    keras.utils.set_random_seed(seed)
    model = network(task, method, setting)
    x, y = arrays(task, "train")
    batch = 64 if task == "digits" else 32
    schedule = keras.optimizers.schedules.CosineDecay(
        rate, decay_steps=epochs * (-(-len(x) // batch))
    )
    optimizer = keras.optimizers.Adam
    if "flipout" not in method:
        # Of dropout, which is tuned by its rate, the prior that goes with it.
        decay = 1e-4 if method == "dropout" else setting
        optimizer = partial(keras.optimizers.AdamW, weight_decay=decay)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if info(model.name).task == "regression":
        loss = GaussianNegativeLogLikelihood()
    watched, options = [], {}
    if TASKS[task][3]:
        # A Bayesian model's loss has the divergence too.
        nll = keras.metrics.MeanMetricWrapper(
            gaussian_negative_log_likelihood, name="nll"
        )
        watched.append(nll)
        keep = keras.callbacks.EarlyStopping(
            "val_nll", mode="min", patience=epochs, restore_best_weights=True
        )
        validation = arrays(task, "validation")
        options = {"validation_data": validation, "callbacks": [keep]}
    model.compile(optimizer(schedule), loss, metrics=watched)
    model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0, **options)
    return model


def predictor(task, method, setting, rate, seed, epochs):
    """Trains, and returns a function from inputs to members' outputs `[B, M, ...]`."""
    train = partial(trained, task, method, setting, rate, epochs=epochs)
    if method == "ensemble":
        models = [train(seed=1000 * (i + 1) + seed) for i in range(MEMBERS)]
        return lambda x: np.stack([m.predict(x, verbose=0) for m in models], 1)
    model = train(seed=seed)
    if "flipout" in method:
        samples = PosteriorSamples(model, DRAWS, seed=seed)
        return lambda x: samples.predict(x, verbose=0)
    if method == "dropout":

        def draws(x):
            found = [model(x, training=True) for _ in range(DRAWS)]
            return np.stack([keras.ops.convert_to_numpy(f) for f in found], 1)

        return draws
    return lambda x: model.predict(x, verbose=0)[:, None]


def of_classifier(logits, y):
    """Figures of members' logits `[B, M, C]`."""
    found = {
        "nll": metrics.EnsembleNegativeLogLikelihood(from_logits=True),
        "brier": metrics.BrierScore(from_logits=True),
        "ece": metrics.ExpectedCalibrationError(from_logits=True),
    }
    for metric in found.values():
        metric.update_state(y, logits)
    probs = special.softmax(logits, -1).mean(1)
    figures = {name: float(metric.result()) for name, metric in found.items()}
    return {**figures, "accuracy": float((probs.argmax(-1) == y).mean())}


def of_regressor(outputs, y):
    """Figures of members' means and variances `[B, M, 1, 2]`."""
    mean, deviation = outputs[..., 0, 0], np.sqrt(outputs[..., 0, 1])
    y = y[:, None]
    log_probs = stats.norm.logpdf(y, mean, deviation)
    nll = np.log(mean.shape[1]) - special.logsumexp(log_probs, axis=1)
    below = stats.norm.cdf(y, mean, deviation).mean(1)  # The mixture's, at the target.
    levels = np.arange(1, 10) / 10
    gaps = [abs(level - (below <= level).mean()) for level in levels]
    rmse = np.sqrt(np.square(mean.mean(1) - y[:, 0]).mean())
    return {
        "nll": float(nll.mean()),
        "calibration": float(np.mean(gaps)),
        "rmse": float(rmse),
    }


def out_of_distribution(predict, x, y):
    """Entropy and accuracy of turned and noisy digits."""
    numbers = np.random.default_rng(0)
    changed = {
        "angle": {
            a: ndimage.rotate(x, a, axes=(1, 2), reshape=False, order=1) for a in ANGLES
        },
        "noise": {n: x + n * numbers.normal(size=x.shape) for n in NOISES},
    }
    entropy = metrics.PredictiveEntropy(from_logits=True)
    found = {}
    for kind, inputs in changed.items():
        found[kind] = {"at": list(inputs), "entropy": [], "accuracy": []}
        for changed_x in inputs.values():
            logits = predict(changed_x.astype("float32"))
            entropy.reset_state()
            entropy.update_state(y, logits)
            found[kind]["entropy"].append(float(entropy.result()))
            right = special.softmax(logits, -1).mean(1).argmax(-1) == y
            found[kind]["accuracy"].append(float(right.mean()))
    return found


def measured(task, method, setting, rate, seed, epochs, splits):
    """The record of one training: the one there is, or a new one."""
    name = METHODS[method][0]
    key = {
        "task": task,
        "method": method,
        "setting": {"learning_rate": rate, name: setting},
        "seed": seed,
        "epochs": epochs,
        "splits": splits,
    }
    for line in results.read(RESULTS):
        if {n: line[n] for n in key} == key:
            return line
    keras.utils.clear_session()
    predict = predictor(task, method, setting, rate, seed, epochs)
    figures = of_classifier if task == "digits" else of_regressor
    record = {"command": "python benchmarks/calibration.py", **key}
    for split in splits:
        x, y = arrays(task, split)
        record[split] = figures(predict(x), y)
    if task == "digits" and "test" in splits:
        record["out_of_distribution"] = out_of_distribution(predict, x, y)
    of_script = SEEDS if "test" in splits else SEARCH_SEEDS
    if epochs == TASKS[task][2] and seed in of_script:
        results.append(RESULTS, record)
    return record


def tuned_and_measured(task, method, epochs, search_seeds, seeds):
    """The records of a method's best setting, over seeds."""
    grid = list(itertools.product(METHODS[method][1], RATES))
    if method == "ensemble":  # Its members are five seeds already.
        search_seeds = search_seeds[:1]
    bar = tqdm(
        total=len(grid) * len(search_seeds) + len(seeds), desc=f"{task}/{method}"
    )

    def run(setting, rate, seed, splits):
        record = measured(task, method, setting, rate, seed, epochs, splits)
        bar.update()
        return record

    def score(candidate):
        lines = [run(*candidate, seed, ["validation"]) for seed in search_seeds]
        return np.mean([line["validation"]["nll"] for line in lines])

    chosen = min(grid, key=score)
    with bar:
        return [run(*chosen, seed, ["validation", "test"]) for seed in seeds]


def figure(path=ROOT / "docs" / "calibration.png"):
    """Draws the entropy of turned and noisy digits, means over seeds."""
    from matplotlib.figure import Figure

    lines = [r for r in results.read(RESULTS) if "out_of_distribution" in r]
    drawn = Figure((9, 3.6), layout="constrained")
    titles = {"angle": "degrees turned", "noise": "deviation of noise, grey levels"}
    for axes, (kind, title) in zip(drawn.subplots(1, 2), titles.items(), strict=True):
        for method in METHODS:
            found = [
                r["out_of_distribution"][kind] for r in lines if r["method"] == method
            ]
            if not found:
                continue
            entropy = np.array([f["entropy"] for f in found])
            at = found[0]["at"]
            axes.plot(at, entropy.mean(0), "o-", markersize=3, label=method)
            axes.fill_between(at, entropy.min(0), entropy.max(0), alpha=0.2)
        axes.set(xlabel=title, ylabel="mean predictive entropy, nats")
        axes.legend()
    drawn.savefig(path, dpi=120)


def main(argv=None):
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pattern", nargs="?", default="*", help="such as digits/*")
    parser.add_argument("--epochs", type=int, help="in place of each task's")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--search-seeds", nargs="+", type=int, default=SEARCH_SEEDS)
    parser.add_argument("--figure", action="store_true")
    arguments = parser.parse_args(argv)
    pairs = [f"{t}/{m}" for t in TASKS for m in METHODS]
    pairs = fnmatch.filter(pairs, arguments.pattern)
    if not pairs:
        parser.error("expected a pattern such as digits/* or */flipout")
    for pair in pairs:
        task, method = pair.split("/")
        epochs = arguments.epochs or TASKS[task][2]
        lines = tuned_and_measured(
            task, method, epochs, arguments.search_seeds, arguments.seeds
        )
        figures = [
            f"{name} {np.mean([r['test'][name] for r in lines]):.4f} ± "
            f"{np.std([r['test'][name] for r in lines]):.4f}"
            for name in lines[0]["test"]
        ]
        print(f"{pair:20s} {lines[0]['setting']}  {'  '.join(figures)}", flush=True)
    if arguments.figure:
        figure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
