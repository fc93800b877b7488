"""K-FAC and Adam in batches: updates to the same validation loss.

    python benchmarks/kfac_validation.py [--figure]

Two networks: `digits`, the residual network `resnet8_digits`, batches of 128 images;
and `text`, a language model of the Python standard library's source with 128 GRU units,
batches of 32 x 50 characters. Each method has a grid, of which every setting is run
from one seed for all updates of the budget; the one with the least validation loss is
run from three other seeds, for both methods the same: equal first weights and batches.
The validation loss is measured after every so many updates, without regularizers.

What counts is the update at which K-FAC reaches the least validation loss of Adam's run
from the same seed, against the update that Adam needed for it; and the seconds, which
leave out evaluations and the first update, which compiles. All run as graphs, one at a
time. Lines of benchmarks/results/kfac_validation.jsonl that are there are not measured
again. `--figure` draws docs/kfac_validation.png from them.
"""

import argparse
import itertools
import os
import sys
import time
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
SEARCH_SEED, SEEDS = 100, (0, 1, 2)
# task -> updates, and after how many of them there is an evaluation
UPDATES = {"digits": (300, 10), "text": (600, 20)}
GRIDS = {
    "adam": {"learning_rate": (3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2)},
    "kfac": {"learning_rate": (0.03, 0.1, 0.3), "damping": (0.01, 0.1)},
}


def grid(method):
    """The settings of a method."""
    names, values = zip(*GRIDS[method].items(), strict=True)
    return [dict(zip(names, v, strict=True)) for v in itertools.product(*values)]


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
    for split in ("train", "validation"):
        examples = zoo.load("digits", split, data_dir=DATA)[0].as_numpy_iterator()
        found.append(tuple(np.array(part) for part in zip(*examples, strict=True)))
    return *found, 10


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
        return zoo.build("resnet8_digits")
    return keras.Sequential(
        [
            keras.Input((50,), dtype="int32"),
            keras.layers.Embedding(classes, 64),
            keras.layers.GRU(128, return_sequences=True),
            keras.layers.Dense(classes),
        ]
    )


def trained(task, data, method, setting, seed):
    """The curve of a training, and the seconds that its first update took."""
    train, validation, classes = data
    model = network(task, classes, seed)
    if method == "adam":
        optimizer = keras.optimizers.Adam(**setting)
    else:
        optimizer = KFAC(model, seed=0, **setting)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalCrossentropy("nll", from_logits=True)],
        jit_compile=False,
    )
    of_train, clock = batches(task, train, seed), time.perf_counter
    start = clock()
    model.train_on_batch(*next(of_train))
    compiled, spent, done = clock() - start, 0.0, 1
    updates, every = UPDATES[task]
    curve = {"update": [], "nll": [], "seconds": []}
    while done < updates:
        start = clock()
        for _ in range(every - done % every):
            model.train_on_batch(*next(of_train))
            done += 1
        spent += clock() - start
        found = model.evaluate(*validation, 256, verbose=0, return_dict=True)["nll"]
        curve["update"].append(done)
        curve["nll"].append(round(float(found), 6))
        curve["seconds"].append(round(spent, 3))
        if not np.isfinite(found):
            break
    return curve, compiled


def measured(task, data, method, setting, seed):
    """The record of one training: the one there is, or a new one."""
    key = {"task": task, "method": method, "setting": setting, "seed": seed}
    key["updates"] = UPDATES[task][0]
    for line in results.read(RESULTS):
        if {name: line[name] for name in key} == key:
            return line
    keras.utils.clear_session()
    curve, compiled = trained(task, data, method, setting, seed)
    best = int(np.nanargmin(curve["nll"]))
    record = {
        "command": "python benchmarks/kfac_validation.py",
        **key,
        "nll": curve["nll"][best],
        "at_update": curve["update"][best],
        "at_seconds": curve["seconds"][best],
        "compile_seconds": round(compiled, 2),
        "curve": curve,
    }
    results.append(RESULTS, record)
    return record


def compared(adam, kfac):
    """A line on when K-FAC reaches Adam's least validation loss."""
    told = f"{kfac['task']}, seed {kfac['seed']}: Adam {adam['nll']:.4f} at update "
    told += f"{adam['at_update']}, {adam['at_seconds']:.1f} s; K-FAC "
    found = reached(kfac, "nll", adam["nll"])
    if found is None:
        return told + f"does not reach it: {kfac['nll']:.4f}"
    return told + (
        f"at {found[0]}, {found[1]:.1f} s; its least {kfac['nll']:.4f} "
        f"at {kfac['at_update']}"
    )


def figure(path=ROOT / "docs" / "kfac_validation.png"):
    """Draws the validation losses against updates and seconds, of each seed."""
    from matplotlib.figure import Figure

    drawn = Figure((9, 7), layout="constrained")
    lines = [line for line in results.read(RESULTS) if line["seed"] in SEEDS]
    for row, task in zip(drawn.subplots(2, 2, sharey="row"), UPDATES, strict=True):
        for axes, name in zip(row, ("update", "seconds"), strict=True):
            for color, method in enumerate(GRIDS):
                runs = [r for r in lines if (r["task"], r["method"]) == (task, method)]
                for i, line in enumerate(runs):
                    curve, label = line["curve"], None if i else method
                    axes.plot(curve[name], curve["nll"], f"C{color}", lw=1, label=label)
            axes.set(xlabel=name, xscale="log", yscale="log")
        row[0].set(ylabel=f"{task}: validation NLL")
        row[1].legend()
    drawn.savefig(path, dpi=120)


def main(argv=None):
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", nargs="+", choices=list(UPDATES), default=UPDATES)
    parser.add_argument("--figure", action="store_true")
    arguments = parser.parse_args(argv)
    for task in arguments.task:
        data, found = task_data(task), {}
        for method in GRIDS:
            lines = [
                measured(task, data, method, setting, SEARCH_SEED)
                for setting in tqdm(grid(method))
            ]
            for line in lines:
                print(task, method, line["setting"], line["nll"], line["at_update"])
            found[method] = min(lines, key=lambda line: line["nll"])["setting"]
        runs = {
            method: [
                measured(task, data, method, setting, seed) for seed in tqdm(SEEDS)
            ]
            for method, setting in found.items()
        }
        for pair in zip(runs["adam"], runs["kfac"], strict=True):
            print(compared(*pair), flush=True)
    if arguments.figure:
        figure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
