"""A deep autoencoder by K-FAC's adaptive mode, tuned SGD with momentum, and Adam.

    python benchmarks/autoencoder.py [--data mnist] [--figure]

The network of Martens and Grosse (2015), 784-1000-500-250-30 and back, and for the 8x8
digits 64-400-200-100-12 and back: tanh, a linear code, and the cross-entropy of the
pixels as probabilities of Bernoulli's. What counts is the loss on the training split,
the mean over pixels, without any regularizer. Every update sees the whole split, but
those of `sgd_batches`, SGD in batches of 128: it has as many more updates as take about
the same seconds.

SGD (Nesterov), Adam and K-FAC have grids, of which each setting is run from one seed
for all updates of the budget; the setting with the least loss is run from three other
seeds, for all methods the same, from which they begin with the same weights. K-FAC's
grid is that of λ0 (the paper's, 150, is for a sum over pixels, of which the same would
be 2.3 here); the rest is as in the paper, but for F on every second example.
The bars: K-FAC reaches the least loss of SGD's run in an eighth of the updates that SGD
needed for it, and a third of the seconds.

All run as graphs, one training at a time. Seconds are those of the updates, without the
first one, which compiles (its seconds stand beside). An update's loss is that of its
batch before it; of `sgd_batches` that of the whole split, after each hundred updates,
outside of its seconds. Each line of
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
from curves import reached
from tqdm import tqdm

from kzoo.optimizers import KFAC, Adaptation
from kzoo.zoo import load, results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "autoencoder.jsonl"
SEARCH_SEED, SEEDS = 100, (0, 1, 2)
# data -> the sizes of the layers up to the code, and what a white pixel is
DATA = {"digits": ((400, 200, 100, 12), 16), "mnist": ((1000, 500, 250, 30), 255)}
# method -> updates
UPDATES = {"sgd": 3000, "sgd_batches": 12000, "adam": 3000, "kfac": 200}
BATCH, EVALUATED = 128, 100
FIRST = 400
BARS = (1 / 8, 1 / 3)  # of the updates, and of the seconds


def pixels(data, examples=None):
    """The training split's pixels as probabilities, one row an example."""
    found, _ = load(data, "train", data_dir=ROOT / "runs" / "data")
    x = np.array([image for image, _ in found.as_numpy_iterator()][:examples])
    return x.reshape(len(x), -1).astype("float32") / DATA[data][1]


def grid(method):
    """The settings of a method."""
    if method == "kfac":
        return [{"damping": damping} for damping in (3e-4, 1e-3, 1e-2, 1e-1)]
    if method == "adam":
        return [{"learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3, 1e-2)]
    both = itertools.product((0.3, 0.5, 1.0, 1.5), (0.9, 0.95, 0.99))
    return [{"learning_rate": rate, "momentum": momentum} for rate, momentum in both]


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
    if method.startswith("sgd"):
        return keras.optimizers.SGD(**setting, nesterov=True)
    if method == "adam":
        return keras.optimizers.Adam(**setting)
    return KFAC(
        model,
        damping=setting["damping"],
        inverse_update_period=20,
        subsample=2,
        adaptation=Adaptation(subsample=2),
        seed=0,
    )


def trained(data, x, method, setting, seed, updates):
    """Updates, the losses before them, the seconds till then, and the compiling's."""
    model = autoencoder(data, x.shape[1], seed)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer(method, model, setting), loss, jit_compile=False)
    of_split = batches(x, BATCH if method == "sgd_batches" else None, seed)
    clock, start = time.perf_counter, time.perf_counter()
    loss = float(model.train_on_batch(*next(of_split)))
    compiled, spent = clock() - start, 0.0
    at, losses, seconds = [0], [loss], [0.0]
    while at[-1] + 1 < updates and np.isfinite(losses[-1]):
        start, number = clock(), EVALUATED if method == "sgd_batches" else 1
        for _ in range(number):
            loss = float(model.train_on_batch(*next(of_split)))
        spent += clock() - start
        if number > 1:
            loss = float(model.test_on_batch(x, x))
        at, losses = [*at, at[-1] + number], [*losses, loss]
        seconds.append(spent)
    return at, losses, seconds, compiled


def batches(x, size, seed):
    """Yields shuffled batches without end; of the whole split, if no size is given."""
    random = np.random.default_rng(seed)
    while size is None:
        yield x, x
    while True:
        order = random.permutation(len(x))
        for start in range(0, len(x) - size + 1, size):
            rows = x[order[start : start + size]]
            yield rows, rows


def kept(losses):
    """Which losses a line has: the first ones, then ever fewer."""
    later = np.geomspace(min(losses, FIRST), losses, 100).astype(int) - 1
    return np.unique([*range(min(losses, FIRST)), *later]).tolist()


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
    at, losses, seconds, compiled = trained(data, x, method, setting, seed, updates)
    best = int(np.nanargmin(losses))
    chosen = kept(len(losses))
    record = {
        "command": "python benchmarks/autoencoder.py",
        **key,
        "loss": losses[best],
        "at_update": at[best],
        "at_seconds": round(seconds[best], 3),
        "compile_seconds": round(compiled, 2),
        "curve": {
            "update": [at[i] for i in chosen],
            "loss": [float(f"{losses[i]:.6g}") for i in chosen],
            "seconds": [round(seconds[i], 3) for i in chosen],
        },
    }
    if recorded:
        results.append(RESULTS, record)
    return record


def compared(other, kfac):
    """A line on when K-FAC reaches another method's least loss, and the bars."""
    found = reached(kfac, "loss", other["loss"])
    told = f"seed {kfac['seed']}: {other['method']} {other['loss']:.5f} at update "
    told += f"{other['at_update']}, {other['at_seconds']:.1f} s; K-FAC "
    if found is None:
        return told + f"does not reach it: {kfac['loss']:.5f}"
    ratios = found[0] / other["at_update"], found[1] / other["at_seconds"]
    said = [
        f" ({'kept' if ratio <= bar else 'missed'})" if other["method"] == "sgd" else ""
        for ratio, bar in zip(ratios, BARS, strict=True)
    ]
    return told + (
        f"at {found[0]}, {found[1]:.1f} s: {ratios[0]:.3f} of its updates{said[0]}, "
        f"{ratios[1]:.3f} of its seconds{said[1]}; at last {kfac['loss']:.5f}"
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
                # A logarithm has no place for what comes first, at 0.
                axes.plot(
                    curve[name][1:], curve["loss"][1:], f"C{color}", lw=1, label=label
                )
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

    best, found = {}, {}
    for method in UPDATES:
        lines = [run(method, setting, SEARCH_SEED) for setting in tqdm(grid(method))]
        for line in lines:
            print(f"{method:12s}{_written(line['setting'])}: {line['loss']:.5f}")
        best[method] = min(lines, key=lambda line: line["loss"])["setting"]
    for method, setting in best.items():
        found[method] = [run(method, setting, seed) for seed in tqdm(seeds)]
        of_seeds = ", ".join(f"{line['loss']:.5f}" for line in found[method])
        print(f"{method}, {_written(setting)}: {of_seeds}", flush=True)
    for *others, kfac in zip(*found.values(), strict=True):
        for other in others:
            print(compared(other, kfac))
    if arguments.figure:
        figure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
