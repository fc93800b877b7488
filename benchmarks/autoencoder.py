"""A deep autoencoder by K-FAC's adaptive mode, tuned SGD with momentum, and Adam.

    python benchmarks/autoencoder.py [--data mnist] [--figure]

The network of Martens and Grosse (2015), 784-1000-500-250-30 and back, and for the 8x8
digits 64-400-200-100-12 and back: tanh, a linear code, and the cross-entropy of the
pixels as probabilities of Bernoulli's. Every update sees the whole training split, and
what counts is the loss on it, the mean over pixels, without any regularizer.

SGD (Nesterov) and Adam have grids, of which each setting is run from one seed for all
updates of the budget; the setting with the least loss is run from three other seeds.
K-FAC has one setting: the paper's, but for its λ0 = 150, which is for a sum over pixels
and here divided by their number. From the same seed it begins with the same weights.
Its bars: it reaches the least loss of SGD's run in an eighth of the updates that SGD
needed for it, and a third of the seconds.

All run as graphs, one training at a time. Seconds are those of the updates, without the
first one, which compiles (its seconds stand beside). Each line of
benchmarks/results/autoencoder.jsonl is one training; lines that are there are not
measured again. Trainings with other updates, examples or seeds than the script's are
not recorded. `--figure` draws docs/autoencoder.png from the lines of the digits.
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
from tqdm import tqdm

from kzoo.optimizers import KFAC, Adaptation
from kzoo.zoo import load, results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "autoencoder.jsonl"
SEARCH_SEED, SEEDS = 100, (0, 1, 2)
# data -> the sizes of the layers up to the code, and what a white pixel is
DATA = {"digits": ((400, 200, 100, 12), 16), "mnist": ((1000, 500, 250, 30), 255)}
# method -> updates
UPDATES = {"sgd": 3000, "adam": 3000, "kfac": 400}
FIRST = 400
BARS = (1 / 8, 1 / 3)  # of the updates, and of the seconds


def pixels(data, examples=None):
    """The training split's pixels as probabilities, one row an example."""
    found, _ = load(data, "train", data_dir=ROOT / "runs" / "data")
    x = np.array([image for image, _ in found.as_numpy_iterator()][:examples])
    return x.reshape(len(x), -1).astype("float32") / DATA[data][1]


def grids(size):
    """The settings of each method, for an example of that many pixels."""
    sgd = itertools.product((0.3, 1.0, 3.0, 10.0), (0.9, 0.95, 0.99))
    return {
        "sgd": [
            {"learning_rate": rate, "momentum": momentum} for rate, momentum in sgd
        ],
        "adam": [{"learning_rate": rate} for rate in (1e-4, 3e-4, 1e-3, 3e-3)],
        "kfac": [{"damping": 150 / size, "subsample": 2, "products_subsample": 2}],
    }


def autoencoder(data, size, seed):
    """The network, not compiled."""
    keras.utils.set_random_seed(seed)
    hidden = DATA[data][0]
    model = keras.Sequential([keras.Input((size,))])
    for units in (*hidden, *hidden[-2::-1]):
        code = units == hidden[-1]
        model.add(keras.layers.Dense(units, None if code else "tanh"))
    model.add(keras.layers.Dense(size))
    return model


def optimizer(method, model, setting):
    """A method's optimizer."""
    if method == "sgd":
        return keras.optimizers.SGD(**setting, nesterov=True)
    if method == "adam":
        return keras.optimizers.Adam(**setting)
    return KFAC(
        model,
        damping=setting["damping"],
        inverse_update_period=20,
        subsample=setting["subsample"],
        adaptation=Adaptation(subsample=setting["products_subsample"]),
        seed=0,
    )


def trained(data, x, method, setting, seed, updates):
    """The losses before each update, the seconds till then, and the compiling's."""
    model = autoencoder(data, x.shape[1], seed)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer(method, model, setting), loss, jit_compile=False)
    start = time.perf_counter()
    losses, seconds = [float(model.train_on_batch(x, x))], [0.0]
    compiled, start = time.perf_counter() - start, time.perf_counter()
    while len(losses) < updates and np.isfinite(losses[-1]):
        losses.append(float(model.train_on_batch(x, x)))
        seconds.append(time.perf_counter() - start)
    return np.array(losses), np.array(seconds), compiled


def kept(updates):
    """The updates of which a line has the loss: the first ones, then ever fewer."""
    later = np.geomspace(min(updates, FIRST), updates, 100).astype(int) - 1
    return np.unique([*range(min(updates, FIRST)), *later]).tolist()


def measured(data, x, method, setting, seed, updates, recorded):
    """The record of one training: the one there is, or a new one."""
    key = {
        "data": data,
        "method": method,
        "setting": setting,
        "seed": seed,
        "updates": updates,
        "examples": len(x),
    }
    for line in results.read(RESULTS):
        if {name: line[name] for name in key} == key:
            return line
    keras.utils.clear_session()
    losses, seconds, compiled = trained(data, x, method, setting, seed, updates)
    best = int(np.nanargmin(losses))
    at = kept(len(losses))
    record = {
        "command": "python benchmarks/autoencoder.py",
        **key,
        "loss": float(losses[best]),
        "at_update": best,
        "at_seconds": round(float(seconds[best]), 3),
        "compile_seconds": round(compiled, 2),
        "curve": {
            "update": at,
            "loss": [float(f"{losses[i]:.6g}") for i in at],
            "seconds": [round(float(seconds[i]), 3) for i in at],
        },
    }
    if recorded:
        results.append(RESULTS, record)
    return record


def reached(record, loss):
    """The update and the seconds at which a loss is reached, or None."""
    curve = record["curve"]
    for update, found, seconds in zip(*curve.values(), strict=True):
        if found <= loss:
            return update, seconds
    return None


def compared(sgd, kfac):
    """A line that says whether K-FAC has kept its bars, and the two ratios."""
    found = reached(kfac, sgd["loss"])
    told = f"seed {sgd['seed']}: SGD {sgd['loss']:.5f} at update {sgd['at_update']}, "
    told += f"{sgd['at_seconds']:.1f} s; K-FAC "
    if found is None:
        return told + f"does not reach it: {kfac['loss']:.5f}"
    ratios = found[0] / sgd["at_update"], found[1] / sgd["at_seconds"]
    kept = [
        "kept" if ratio <= bar else "missed"
        for ratio, bar in zip(ratios, BARS, strict=True)
    ]
    return told + (
        f"at {found[0]}, {found[1]:.1f} s: {ratios[0]:.3f} of its updates ({kept[0]}), "
        f"{ratios[1]:.3f} of its seconds ({kept[1]}); at last {kfac['loss']:.5f}"
    )


def figure(path=ROOT / "docs" / "autoencoder.png"):
    """Draws the losses against updates and seconds, of each seed."""
    from matplotlib.figure import Figure

    drawn = Figure((9, 3.8), layout="constrained")
    both = drawn.subplots(1, 2, sharey=True)
    lines = [
        line
        for line in results.read(RESULTS)
        if line["data"] == "digits" and line["seed"] in SEEDS
    ]
    for axes, name in zip(both, ("update", "seconds"), strict=True):
        for color, method in enumerate(UPDATES):
            of_method = [line for line in lines if line["method"] == method]
            for i, line in enumerate(of_method):
                curve = line["curve"]
                label = None if i else f"{method}, {_written(line['setting'])}"
                axes.plot(curve[name], curve["loss"], f"C{color}", lw=1, label=label)
        axes.set(xlabel=name, xscale="log", yscale="log")
    both[0].set(ylabel="cross-entropy of a pixel, training split")
    both[1].legend(fontsize=8)
    drawn.savefig(path, dpi=120)


def _written(setting):
    return ", ".join(f"{name} {value:.3g}" for name, value in setting.items())


def main(argv=None):
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", choices=list(DATA), default="digits")
    parser.add_argument("--examples", type=int, help="the first ones, in place of all")
    parser.add_argument("--updates", type=int, help="in place of each method's")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--figure", action="store_true")
    arguments = parser.parse_args(argv)
    data, seeds = arguments.data, arguments.seeds
    x = pixels(data, arguments.examples)
    plain = arguments.updates is None and arguments.examples is None
    recorded = plain and set(seeds) <= set(SEEDS)

    def run(method, setting, seed):
        updates = arguments.updates or UPDATES[method]
        return measured(data, x, method, setting, seed, updates, recorded)

    found = {}
    for method in UPDATES:
        grid = grids(x.shape[1])[method]
        if len(grid) > 1:
            lines = [run(method, setting, SEARCH_SEED) for setting in tqdm(grid)]
            for line in lines:
                print(f"{method:5s}{_written(line['setting'])}: {line['loss']:.5f}")
            grid = [min(lines, key=lambda line: line["loss"])["setting"]]
        found[method] = [run(method, grid[0], seed) for seed in tqdm(seeds)]
        of_seeds = ", ".join(f"{line['loss']:.5f}" for line in found[method])
        print(f"{method}, {_written(grid[0])}: {of_seeds}", flush=True)
    for sgd, kfac in zip(found["sgd"], found["kfac"], strict=True):
        print(compared(sgd, kfac))
    if arguments.figure:
        figure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
