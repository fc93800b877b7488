"""K-FAC and Adam in batches: updates to the same validation loss.

    python benchmarks/kfac_validation.py [--task digits] [--figure]

Two networks: `digits`, the residual network `resnet8_digits`, batches of 128 images;
and `text`, a language model of the Python standard library's source with 128 GRU units,
batches of 32 x 50 characters.

The validation loss, without regularizers, is measured after every so many updates and
averaged over seeds, whose first weights and batches are the same for both methods. Of
the digits it is that of all 539 that are not trained on (of the 180 of the validation
split it is a matter of a few), with batch normalization by the mean and variance of all
training images, so that what is evaluated follows the weights.

Each method has a grid, of which every setting is run from the seeds of the search:
rates that stay, or fall to 0 by half a cosine of so many updates; and on the digits
also weight decay, and the loss of the weights or of their moving average. Of each
method the setting is chosen that has the least loss. What counts is when, from other
seeds, K-FAC's loss is at Adam's least, against the update that Adam needed for it; and
the seconds, which leave out evaluations, averages of weights, and the first update,
which compiles. All run as graphs, those of other seeds one at a time.
Lines of benchmarks/results/kfac_validation.jsonl that are there are not measured again.
(Those of K-FAC with a norm constraint of 0.03, and with a cosine of 100, are of a part
of the search that was given up.)
`--figure` draws docs/kfac_validation.png from them.
"""

import argparse
import itertools
import os
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from curves import reached
from tqdm import tqdm

from kzoo import zoo
from kzoo.optimizers import KFAC
from kzoo.zoo import results
from kzoo.zoo.datasets.text_streams import text_streams

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "kfac_validation.jsonl"
DATA = ROOT / "runs" / "data"
# Levels, as multiples of Adam's least loss.
LEVELS = {"digits": (8, 2, 1), "text": (1.2, 1.05, 1)}
COMMAND = "python benchmarks/kfac_validation.py"
SEARCH_SEEDS = (100, 101, 102)
SEEDS = tuple(range(10))
# task -> updates, and after how many of them there is an evaluation
UPDATES = {"digits": (200, 10), "text": (300, 20)}
# What a moving average of weights keeps at an update, where there is one.
AVERAGE = {"digits": 0.95}
GRIDS = {
    "digits": {
        "adam": {
            "learning_rate": (5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 8e-2),
            "global_clipnorm": (1.0,),
            "weight_decay": (None, 0.1, 0.3, 1.0),
            "cosine": (None, 150, 200),
        },
        "kfac": {
            "learning_rate": (0.3,),
            "damping": (0.03, 0.1),
            "norm_constraint": (0.003, 0.01),
            "weight_decay": (0.03, 0.1),
            "cosine": (None, 150),
        },
    },
    "text": {
        "adam": {
            "learning_rate": (5e-3, 1e-2, 2e-2, 3e-2, 5e-2),
            "global_clipnorm": (None, 1.0),
            "cosine": (None, 240, 300),
        },
        "kfac": {
            "learning_rate": (0.3,),
            "damping": (0.01, 0.03, 0.1),
            "norm_constraint": (0.003, 0.01),
            "cosine": (None, 240, 300),
        },
    },
}


def grid(task, method):
    """The settings of a method."""
    names, values = zip(*GRIDS[task][method].items(), strict=True)
    return [dict(zip(names, v, strict=True)) for v in itertools.product(*values)]


def trainings(task):
    """How many trainings a task takes."""
    return sum(
        len(SEARCH_SEEDS) * len(grid(task, method)) + len(SEEDS)
        for method in GRIDS[task]
    )


def task_data(task):
    """Training examples, what is evaluated, and the number of classes."""
    if task == "text":
        streams, characters = text_streams(
            splits=("train", "validation"), rows=32, steps=50, data_dir=DATA
        )
        train, validation = (
            tuple(
                np.stack(list(part))
                for part in zip(*s.as_numpy_iterator(), strict=True)
            )
            for s in (streams["train"].take(1000), streams["validation"].take(20))
        )
        # A batch is 32 rows of one step of all streams; they are evaluated as rows.
        validation = tuple(part.reshape(-1, part.shape[-1]) for part in validation)
        return train, validation, len(characters) + 1
    found = []
    for split in ("train", "validation", "test"):
        examples = zoo.load("digits", split, data_dir=DATA)[0].as_numpy_iterator()
        found.append(tuple(np.array(part) for part in zip(*examples, strict=True)))
    train, *others = found
    return train, tuple(map(np.concatenate, zip(*others, strict=True))), 10


def batches(task, data, seed):
    """Yields batches in a shuffled order, without end."""
    random, (x, y) = np.random.default_rng(seed), data
    size = 128 if task == "digits" else 1
    while True:
        order = random.permutation(len(x))
        for start in range(0, len(x) - size + 1, size):
            rows = order[start : start + size]
            yield (x[rows], y[rows]) if size > 1 else (x[rows[0]], y[rows[0]])


def network(task, classes, seed):
    """The network, not compiled."""
    keras.utils.set_random_seed(seed)
    if task == "digits":
        # With a momentum of 0 what it keeps is the last batch's.
        normalization = partial(keras.layers.BatchNormalization, momentum=0.0)
        return zoo.build("resnet8_digits", normalization=normalization)
    return keras.Sequential(
        [
            keras.Input((50,), dtype="int32"),
            keras.layers.Embedding(classes, 64),
            keras.layers.GRU(128, return_sequences=True),
            keras.layers.Dense(classes),
        ]
    )


def optimizer_of(method, model, learning_rate, cosine, **setting):
    """The optimizer with a setting."""
    if cosine:
        schedules = keras.optimizers.schedules
        learning_rate = schedules.CosineDecay(learning_rate, cosine)
    if method == "adam":
        return keras.optimizers.Adam(learning_rate, **setting)
    return KFAC(model, learning_rate, seed=0, **setting)


def trained(task, data, method, setting, seed):
    """The curve of a training, and the seconds that its first update took."""
    train, validation, classes = data
    model = network(task, classes, seed)
    updates, every = UPDATES[task]
    updates = setting["cosine"] or updates  # Then the rate is 0.
    model.compile(
        optimizer_of(method, model, **setting),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalCrossentropy("nll", from_logits=True)],
        jit_compile=False,
    )

    def loss():
        if task == "digits":
            model(train[0], training=True)
        found = model.evaluate(*validation, 256, verbose=0, return_dict=True)["nll"]
        return round(float(found), 6)

    of_train, clock = batches(task, train, seed), time.perf_counter
    start = clock()
    model.train_on_batch(*next(of_train))
    compiled, spent, done = clock() - start, 0.0, 1
    kept, average = AVERAGE.get(task), model.get_weights()
    curve = {"update": [], "nll": [], "seconds": []}
    if kept:
        curve["nll_of_average"] = []
    while done < updates:
        for _ in range(every - done % every):
            start = clock()
            model.train_on_batch(*next(of_train))
            spent += clock() - start
            done += 1
            if kept:
                pairs = zip(average, model.get_weights(), strict=True)
                average = [kept * old + (1 - kept) * new for old, new in pairs]
        curve["update"].append(done)
        curve["nll"].append(loss())
        curve["seconds"].append(round(spent, 3))
        if kept:
            weights = model.get_weights()
            model.set_weights(average)
            curve["nll_of_average"].append(loss())
            model.set_weights(weights)
    return curve, compiled


def key_of(task, method, setting, seed):
    """What a training's record is found by."""
    key = {"task": task, "method": method, "setting": setting, "seed": seed}
    return {**key, "updates": UPDATES[task][0]}


def recorded(task, method, setting, seed):
    """The record that there is of a training, or None."""
    key = key_of(task, method, setting, seed)
    for line in results.read(RESULTS):
        if line.items() >= key.items():
            return line
    return None


def measured(task, data, method, setting, seed):
    """The record of one training: the one there is, or a new one."""
    if line := recorded(task, method, setting, seed):
        return line
    keras.utils.clear_session()
    curve, compiled = trained(task, data, method, setting, seed)
    best = int(np.nanargmin(curve["nll"]))
    record = {
        "command": COMMAND,
        **key_of(task, method, setting, seed),
        "nll": curve["nll"][best],
        "at_update": curve["update"][best],
        "at_seconds": curve["seconds"][best],
        "compile_seconds": round(compiled, 2),
        "curve": curve,
    }
    results.append(RESULTS, record)
    return record


def view(run, averaged):
    """A training as a record of the loss of its weights, or of their average."""
    curve = dict(run["curve"])
    of_average = curve.pop("nll_of_average", None)
    if averaged:
        curve["nll"] = of_average
    return {**run, "averaged": averaged, "curve": curve}


def mean(runs):
    """Trainings of one setting as one record, with the means over their seeds."""
    curves = [run["curve"] for run in runs]
    curve = {name: np.mean([c[name] for c in curves], axis=0) for name in curves[0]}
    curve["nll"] = np.nan_to_num(curve["nll"], nan=np.inf)
    return {**runs[0], "curve": curve, "nll": curve["nll"].min()}


def chosen(task, run):
    """The trainings from SEEDS of each method with the setting that the search chooses.

    Args:
        task: A task.
        run: A function of a method, setting and seed, which returns the record.
    """
    found = {}
    for method in GRIDS[task]:
        searched = []
        for setting in grid(task, method):
            runs = [run(method, setting, seed) for seed in SEARCH_SEEDS]
            for averaged in (False, True) if task in AVERAGE else (False,):
                searched.append(mean([view(one, averaged) for one in runs]))
        best = min(searched, key=lambda own: own["nll"])
        found[method] = [
            view(run(method, best["setting"], seed), best["averaged"]) for seed in SEEDS
        ]
    return found


def compared(task, runs, times):
    """The record of when each method is at so many times Adam's least loss."""
    level = times * mean(runs["adam"])["nll"]

    def when(record):
        at = reached(record, "nll", level)
        return at and [int(at[0]), round(float(at[1]), 2)]

    record = {"command": COMMAND, "task": task, "times": times, "level": level}
    for method, of_seeds in runs.items():
        own = mean(of_seeds)
        record[method] = {
            "setting": own["setting"],
            "averaged": own["averaged"],
            "least": own["nll"],
            "reached": when(own),
            "reached_of_seeds": [when(run) for run in of_seeds],
        }
    return record


def figure(path=ROOT / "docs" / "kfac_validation.png"):
    """Draws the losses against updates and seconds: of each seed, and the mean."""
    from matplotlib.figure import Figure

    drawn = Figure((9, 7), layout="constrained")
    for row, task in zip(drawn.subplots(2, 2, sharey="row"), UPDATES, strict=True):
        found = chosen(task, partial(recorded, task))
        for axes, name in zip(row, ("update", "seconds"), strict=True):
            for color, (method, runs) in enumerate(found.items()):
                for curve in (run["curve"] for run in runs):
                    axes.plot(curve[name], curve["nll"], f"C{color}", lw=0.5, alpha=0.5)
                curve = mean(runs)["curve"]
                axes.plot(curve[name], curve["nll"], f"C{color}", label=method)
            axes.set(xlabel=name, xscale="log", yscale="log")
            axes.tick_params(axis="x", which="minor", labelbottom=False)
        row[0].set(ylabel=f"{task}: NLL")
        row[1].legend()
    drawn.savefig(path, dpi=120)


def main(argv=None):
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", nargs="+", choices=list(UPDATES), default=UPDATES)
    parser.add_argument("--figure", action="store_true")
    arguments = parser.parse_args(argv)
    for task in arguments.task:
        data, bar = task_data(task), tqdm(desc=task, total=trainings(task))

        def run(method, setting, seed, task=task, data=data, bar=bar):
            record = measured(task, data, method, setting, seed)
            tqdm.write(f"{task} {method} {setting} seed {seed}: {record['nll']}")
            bar.update()
            return record

        runs = chosen(task, run)
        bar.close()
        for times in LEVELS[task]:
            record = compared(task, runs, times)
            print(record, flush=True)
            if not any(
                line.items() >= record.items() for line in results.read(RESULTS)
            ):
                results.append(RESULTS, record)
    if arguments.figure:
        figure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
