"""Calibration of Flipout networks and ensembles, and of what they compete with.

    python benchmarks/calibration.py [TASK/METHOD] [--figure]

On the digits (LeNet-5), breast masses (a perceptron that classifies) and the diabetes
data (a perceptron that predicts mean and variance): one plain network; the same with
dropout that stays on at test (MC dropout); an ensemble of five plain networks; Flipout,
which stands twice: with the divergence as it is, its prior tuned, and with the
divergence times a temperature, which is tuned (a "cold posterior", added when the first
had underfitted the validation split; its prior is the model's own); and a BatchEnsemble
of five members, a rank-1 Bayesian network of five, and a MIMO network, all three in the
manner of their papers: the members of the first two see all rows of each batch (a tiled
batch), MIMO's each row four times (batch repetition 4). The breast masses do not have
Flipout, and the diabetes data not the last three, which classify.

Each method has a grid of four settings and the same number of epochs; the setting with
the least negative log-likelihood on the validation split, over two seeds (over one for
the ensemble, which are five networks), is trained from five other seeds, and only those
see the test split. On the diabetes data and the breast masses each training keeps the
weights of its best epoch on the validation split.

What a method costs stands beside: its parameters (of the posteriors too), how many
times a network sees an example of the training batch in a step, and a test example for
a prediction (`passes`), and the processor's seconds of the training, compiling
included. (Lines of the diabetes data, and of searches on the digits, may be older, and
without these.)

Figures of classifiers are `kzoo.zoo.metrics`'s, and the share of the pairs of members
that disagree on an example. Of the diabetes data, `nll` is of the mixture of all
members' normal distributions, and `calibration` the mean over levels p = 0.1, ... 0.9
of |p - share of targets below the p-quantile| (Kuleshov, Fenner, Ermon, "Accurate
Uncertainties for Deep Learning Using Calibrated Regression", 2018.
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
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from scipy import ndimage, special, stats
from tqdm import tqdm

from kzoo.layers import (
    AverageMembers,
    Conv2DRank1,
    DenseRank1,
    MeanFieldNormal,
    NormalPrior,
    PosteriorSamples,
    TileMembers,
    batch_ensemble_initializer,
    to_batch_ensemble,
)
from kzoo.zoo import build, info, load, metrics, results
from kzoo.zoo.diversity import measure_diversity
from kzoo.zoo.losses import (
    GaussianNegativeLogLikelihood,
    gaussian_negative_log_likelihood,
)
from kzoo.zoo.models.mimo import mimo, mimo_batches
from kzoo.zoo.predictive import Predictions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "calibration.jsonl"
DRAWS, MEMBERS, REPETITIONS = 32, 5, 4
SEARCH_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
RATES = (2e-3, 1e-2)
# task -> (plain model, Flipout model, epochs, whether the weights of the epoch with the
# least validation NLL are kept: without that, a network that predicts variances
# overfits the few patients without bounds, and one of few examples gets ever surer)
TASKS = {
    "digits": ("lenet5_digits", "lenet5_flipout_digits", 200, False),
    "breast_cancer": ("mlp_classifier", None, 100, True),
    "diabetes": ("mlp_regressor", "mlp_regressor_flipout", 100, True),
}
# method -> its own setting and the values tried, each with each learning rate
METHODS = {
    "plain": ("weight_decay", (1e-4, 1e-1)),
    "dropout": ("rate", (0.1, 0.3)),
    "ensemble": ("weight_decay", (1e-4, 1e-1)),
    "flipout": ("prior_stddev", (0.3, 1.0)),
    "cold_flipout": ("temperature", (0.01, 0.1)),
    "batch_ensemble": ("fast_weights", (-0.5, 0.5)),
    "rank1": ("prior_stddev", (0.1, 0.3)),
    "mimo": ("members", (2, 3)),
}
IN_ONE_NETWORK = ("batch_ensemble", "rank1", "mimo")
# method -> how often an example goes through a network: in a step, and at test
PASSES = {
    "plain": (1, 1),
    "dropout": (1, DRAWS),
    "ensemble": (MEMBERS, MEMBERS),
    "flipout": (1, DRAWS),
    "cold_flipout": (1, DRAWS),
    "batch_ensemble": (MEMBERS, MEMBERS),
    "rank1": (MEMBERS, MEMBERS * (DRAWS // MEMBERS)),
    "mimo": (REPETITIONS, 1),
}
# classifier -> shape of an example, number of classes
SHAPES = {"digits": ((8, 8, 1), 10), "breast_cancer": ((30,), 2)}
ANGLES = tuple(range(0, 91, 15))
NOISES = (0, 1, 2, 4, 8)  # standard deviations, in grey levels of 0 to 16


def methods(task):
    """The methods that a task has."""
    missing = {"breast_cancer": ("flipout", "cold_flipout"), "diabetes": IN_ONE_NETWORK}
    return [m for m in METHODS if m not in missing.get(task, ())]


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
    num_examples = len(arrays(task, "train")[0])
    if method == "cold_flipout":
        # As if every example had been seen 1 / temperature times.
        return build(flipout, num_examples=num_examples / setting)
    # Kernels start as the means of Flipout's do.
    options = {"kernel_initializer": "he_normal"}
    layers = {"dense": keras.layers.Dense, "conv": keras.layers.Conv2D}
    if method == "rank1":
        layers = {"dense": DenseRank1, "conv": Conv2DRank1}
        posterior = MeanFieldNormal(
            loc_initializer=batch_ensemble_initializer(-setting)  # N(1, setting²)
        )
        options |= {"ensemble_size": MEMBERS, "num_examples": num_examples}
        for r_or_s in ("alpha", "gamma"):
            options[f"{r_or_s}_posterior_fn"] = posterior
            options[f"{r_or_s}_prior_fn"] = NormalPrior(1.0, setting)
    factories = {name: partial(layer, **options) for name, layer in layers.items()}
    if method == "dropout":
        # In front of the dense layers, as LeNet-5's with dropout have it.
        factories["dense"] = with_dropout(factories["dense"], setting)
    if task != "digits":
        del factories["conv"]
    make = partial(build, plain, **factories)
    if method == "batch_ensemble":
        start = dict.fromkeys(
            ("alpha_initializer", "gamma_initializer"),
            batch_ensemble_initializer(setting),
        )
        return to_batch_ensemble(make(), MEMBERS, **start)
    if method == "rank1":
        inner = make()
        x = keras.Input(inner.input_shape[1:])
        rows = inner(TileMembers(MEMBERS)(x))
        return keras.Model(x, AverageMembers(MEMBERS)(rows), name=plain)
    if method == "mimo":
        return mimo(partial(wide, task, make), *SHAPES[task], setting, name=plain)
    return make()


def wide(task, make, input_shape, classes):
    """The network with more inputs side by side, and more logits."""
    if task == "digits":
        return make(input_shape=input_shape, classes=classes)
    times = input_shape[-1] // SHAPES[task][0][-1]
    scale = make().get_layer("scale")
    statistics = [np.tile(np.ravel(s), times) for s in (scale.mean, scale.variance)]
    return make(
        features=input_shape[-1],
        classes=classes,
        input_mean=statistics[0],
        input_variance=statistics[1],
    )


def trained(task, method, setting, rate, seed, epochs):
    """A network, trained."""
    keras.utils.set_random_seed(seed)
    model = network(task, method, setting)
    x, y = arrays(task, "train")
    batch = 64 if task == "digits" else 32
    steps = len(x) // batch if method in IN_ONE_NETWORK else -(-len(x) // batch)
    schedule = keras.optimizers.schedules.CosineDecay(rate, decay_steps=epochs * steps)
    optimizer = keras.optimizers.Adam(schedule)
    if "flipout" not in method:
        # Of what is tuned by something else, the prior that goes with dropout.
        decay = setting if METHODS[method][0] == "weight_decay" else 1e-4
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=decay)
        optimizer.exclude_from_weight_decay(var_names=["alpha", "gamma"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # A Bayesian model's loss has the divergence too.
    nll = keras.metrics.SparseCategoricalCrossentropy("nll", from_logits=True)
    if info(model.name).task == "regression":
        loss = GaussianNegativeLogLikelihood()
        nll = keras.metrics.MeanMetricWrapper(
            gaussian_negative_log_likelihood, name="nll"
        )
    watched, options = [], {}
    if TASKS[task][3]:
        watched.append(nll)
        keep = keras.callbacks.EarlyStopping(
            "val_nll", mode="min", patience=epochs, restore_best_weights=True
        )
        validation = arrays(task, "validation")
        options = {"validation_data": validation, "callbacks": [keep]}
    model.compile(optimizer, loss, metrics=watched)
    examples = {"x": x, "y": y, "batch_size": batch}
    if method in IN_ONE_NETWORK:
        examples = {"x": of_members(x, y, batch, method, setting, seed)}
    model.fit(**examples, epochs=epochs, verbose=0, **options)
    return model


def of_members(x, y, batch, method, setting, seed):
    """Member-major training batches."""
    batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=seed)
    batches = batches.batch(batch, drop_remainder=True)
    if method == "mimo":
        return mimo_batches(
            batches, setting, batch_repetitions=REPETITIONS, seed=seed
        ).prefetch(1)

    def tiled(array):
        return tf.tile(array, [MEMBERS] + [1] * (array.shape.rank - 1))

    return batches.map(lambda *batch: tuple(map(tiled, batch))).prefetch(1)


def predictor(method, models, seed):
    """A function from inputs to the outputs of members or draws, `[B, M, ...]`."""
    (model, *others) = models
    if others:
        return lambda x: np.stack([m.predict(x, verbose=0) for m in models], 1)
    if method in ("batch_ensemble", "mimo"):
        members = Predictions(model)
        return lambda x: np.log(
            np.maximum(
                members.predict(x, verbose=0)["member_probabilities"],
                np.finfo("float32").tiny,
            )
        )
    if method == "rank1":
        rows = keras.Model(model.input, model.layers[-1].input)
        samples = PosteriorSamples(rows, DRAWS // MEMBERS, seed=seed)

        def of_all(x):  # [M * B, K, C] -> [B, M * K, C]
            found = samples.predict(x, batch_size=len(x), verbose=0)
            found = found.reshape(MEMBERS, len(x), -1, found.shape[-1])
            return np.moveaxis(found, 0, 1).reshape(len(x), -1, found.shape[-1])

        return of_all
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
    probs = special.softmax(logits, -1)
    figures = {name: float(metric.result()) for name, metric in found.items()}
    figures["accuracy"] = float((probs.mean(1).argmax(-1) == y).mean())
    disagreement = 0.0
    if probs.shape[1] > 1:
        disagreement = float(measure_diversity(probs, y).figures()["disagreement"])
    return {**figures, "disagreement": disagreement}


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
    seeds = [seed]
    if method == "ensemble":
        seeds = [1000 * (i + 1) + seed for i in range(MEMBERS)]
    start = time.process_time()
    models = [trained(task, method, setting, rate, s, epochs) for s in seeds]
    cost = {
        "parameters": sum(model.count_params() for model in models),
        "passes": PASSES[method],
        "processor_seconds": round(time.process_time() - start, 1),
    }
    predict = predictor(method, models, seed)
    figures = of_regressor if task == "diabetes" else of_classifier
    record = {"command": "python benchmarks/calibration.py", **key, **cost}
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
    pairs = [f"{task}/{method}" for task in TASKS for method in methods(task)]
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
