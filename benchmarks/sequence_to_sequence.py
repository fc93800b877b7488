"""Encoder-decoders with attention: reversible layers against Keras's.

    python benchmarks/sequence_to_sequence.py [PATTERN] [--seeds 0 1 2]

Each run trains a network to write names in camel case (the data set `camel_case`), for
each kind of recurrent layer and each of what the decoder may attend to. Training stops
when the loss on the validation split has not fallen for a while, or the budget of
updates is used up, and goes back to the weights of the least; then the test split's
names are translated, by greedy search and with four beams. A line of
benchmarks/results/sequence_to_sequence.jsonl has the share of them that is right to the
last character, the share of characters that are right after right ones, and what a
training step of encoder and decoder each needs beside its arguments and results, by the
compiler's own report, for longer sequences than these. The encoder's has what is
attended to; the decoder's the attention, the logits and the loss. Runs that have a line
with the same settings are not run again. At the end the exact match of reversible
layers, a mean over seeds, is compared with that of Keras's, with a bar. The pattern is
of a network's name and what it attends to, such as "rev_gru_3 slice*".

Reversible networks have about as many weights as their peers. Each network has the
learning rate whose validation loss is the least from the first seed, of a grid that
goes on until the best is not at its end.
"""

import argparse
import fnmatch
import itertools
import os
import sys
import time
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import ops
from reversible_memory import bytes_of_gradient
from tqdm import tqdm

from kzoo.layers import RevGRU, RevLSTM
from kzoo.zoo import load, results
from kzoo.zoo.datasets.camel_case import LENGTH, VOCABULARY
from kzoo.zoo.models.attention_seq2seq import ATTEND_TO, attention_seq2seq, translator

RESULTS = Path(__file__).parent / "results" / "sequence_to_sequence.jsonl"
SEEDS = (0, 1, 2)
# kind -> (layer, units with which there are as many weights)
LAYERS = {
    "gru": (keras.layers.GRU, 128),
    "rev_gru_3": (partial(RevGRU, max_forget_bits=3), 144),
    "rev_gru_2": (partial(RevGRU, max_forget_bits=2), 144),
    "rev_gru_5": (partial(RevGRU, max_forget_bits=5), 144),
    "lstm": (keras.layers.LSTM, 128),
    "rev_lstm_3": (partial(RevLSTM, max_forget_bits=3), 132),
}
SIZES = {"slice_size": 20, "dropout": 0.1}
BATCH, EPOCHS, PATIENCE = 64, 8, 3
RATES = (4e-3, 8e-3, 1.6e-2)
# What memory is measured of.
ROWS, STEPS, UNITS = 64, 100, 256
# Which part of its peer's exact match that of a reversible layer is to be, at least.
BAR = 0.98
# The settings of the first lines that they do not tell.
UNTOLD = {
    "dataset": "camel_case",
    "dtype": "float32",
    "jit_compile": True,
    "most_epochs": 8,
    "patience": 3,
}


def network(kind, attend_to, **changes):
    """An encoder-decoder of a kind of recurrent layer."""
    layer, units = LAYERS[kind]
    sizes = {"units": units, **SIZES, **changes}
    return attention_seq2seq(VOCABULARY, recurrent=layer, attend_to=attend_to, **sizes)


def arrays(split):
    """Inputs and labels of a split."""
    rows = list(load("camel_case", split)[0].as_numpy_iterator())
    inputs = {k: np.stack([x[k] for x, _ in rows]) for k in ("source", "target")}
    return inputs, np.stack([label for _, label in rows])


def trained(model, learning_rate, seed, data):
    """Trains a network; returns what there is to tell of it."""
    train, validation = data["train"], data["validation"]
    steps = len(train[1]) // BATCH
    rate = keras.optimizers.schedules.CosineDecay(learning_rate, EPOCHS * steps)
    model.compile(
        keras.optimizers.Adam(rate, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=True,
    )
    stop = keras.callbacks.EarlyStopping(patience=PATIENCE, restore_best_weights=True)
    order = np.random.default_rng(seed).permutation(len(train[1]))[: steps * BATCH]
    inputs, labels = ({k: v[order] for k, v in train[0].items()}, train[1][order])
    start = time.perf_counter()
    history = model.fit(
        inputs,
        labels,
        batch_size=BATCH,
        epochs=EPOCHS,
        validation_data=validation,
        validation_batch_size=BATCH,
        callbacks=[stop],
        verbose=0,
    ).history
    seconds = time.perf_counter() - start
    _, accuracy = model.evaluate(*data["test"], batch_size=BATCH, verbose=0)
    return {
        "epochs": len(history["loss"]),
        "updates": steps * len(history["loss"]),
        "seconds": round(seconds, 1),
        "validation_loss": min(history["val_loss"]),
        "token_accuracy": accuracy,
    }


def exact_match(model, data, beams):
    """Share of the test split's names that are written right."""
    inputs, labels = data["test"]
    found = translator(model, beams=beams, length=LENGTH).predict(
        inputs["source"], batch_size=256, verbose=0
    )
    return float((found["ids"] == labels).all(-1).mean())


@cache
def memory(kind, attend_to):
    """Bytes of a training step of the encoder, and of the decoder."""
    import jax

    model = network(kind, attend_to, units=UNITS, dropout=0.0)
    _, attended = model.get_layer("attention").input
    states = keras.tree.flatten(model.get_layer("encoder0").output[1:])
    encoder = keras.Model(model.input["source"], [attended, *states])
    given = [model.input["target"], attended, *states]
    decoder = keras.Model(given, model.output)
    ids = jax.ShapeDtypeStruct((ROWS, STEPS), "int32")

    def loss(part, weights, x):
        others = [v.value for v in part.non_trainable_variables]
        found, _ = part.stateless_call(weights, others, x, training=True)
        if part is encoder:
            return sum(ops.sum(ops.square(y)) for y in found)
        return ops.sum(
            ops.sparse_categorical_crossentropy(x[0], found, from_logits=True)
        )

    others = [
        jax.ShapeDtypeStruct((ROWS, *[n or STEPS for n in x.shape[1:]]), x.dtype)
        for x in (attended, *states)
    ]
    return {
        "encoder": bytes_of_gradient(partial(loss, encoder), encoder, ids),
        "decoder": bytes_of_gradient(partial(loss, decoder), decoder, [ids, *others]),
    }


def settings(kind, attend_to, seed, learning_rate):
    """What a line tells of a run before it begins."""
    return {
        "network": kind,
        "attend_to": attend_to,
        "seed": seed,
        "dataset": "camel_case",
        "units": LAYERS[kind][1],
        **SIZES,
        "batch_size": BATCH,
        "most_epochs": EPOCHS,
        "patience": PATIENCE,
        "learning_rate": learning_rate,
        "memory_of": {"rows": ROWS, "steps": STEPS, "units": UNITS},
        "backend": keras.backend.backend(),
        "dtype": keras.config.dtype_policy().name,
        "jit_compile": True,
    }


def recorded(asked, lines):
    """The latest line of a run with these settings, or None."""
    for line in reversed(lines):
        told = {**UNTOLD, **line}
        if all(told.get(name) == value for name, value in asked.items()):
            return line
    return None


def run(asked, data):
    """Trains one network and measures it."""
    kind, attend_to, seed = (asked[name] for name in ("network", "attend_to", "seed"))
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = network(kind, attend_to)
    return {
        **asked,
        "parameters": model.count_params(),
        **trained(model, asked["learning_rate"], seed, data),
        "exact_match": exact_match(model, data, 1),
        "exact_match_4_beams": exact_match(model, data, 4),
        "bytes": memory(kind, attend_to),
        "peer": peer_of(kind),
        "bar": BAR if peer_of(kind) else None,
        "command": "python benchmarks/sequence_to_sequence.py",
    }


@cache
def data_set():
    """The splits' arrays."""
    return {split: arrays(split) for split in ("train", "validation", "test")}


def measured(asked):
    """The line of a run, which is the one there is or a new one."""
    line = recorded(asked, results.read(RESULTS))
    if line is None:
        line = run(asked, data_set())
        results.append(RESULTS, line)
        names = ("network", "attend_to", "learning_rate", "seed", "bytes")
        tqdm.write(
            f"{' '.join(str(line[name]) for name in names)}: validation loss "
            f"{line['validation_loss']:.4f}, exact match {line['exact_match']:.3f}, "
            f"{line['seconds']:.0f} s"
        )
    return line


def tuned(kind, attend_to):
    """The learning rate of a network, and none of those beside it is as good."""

    def loss(rate):
        return measured(settings(kind, attend_to, SEEDS[0], rate))["validation_loss"]

    rates = [*RATES]
    while (best := min(rates, key=loss)) in (rates[0], rates[-1]):
        rates = [best / 2, *rates] if best == rates[0] else [*rates, 2 * best]
    return best


def peer_of(kind):
    """The network of Keras's layer that a reversible one is compared with, or None."""
    return kind.split("_")[1] if kind.startswith("rev_") else None


def parts_of_peers(lines):
    """Which part of its peer's exact match each reversible network's is.

    Args:
        lines: The lines of runs.

    Returns:
        A dict by network and what it attends to, of those whose peer has lines of the
        same seeds: their mean over these seeds by the peer's.
    """
    runs = {}
    for line in lines:
        of_seeds = runs.setdefault((line["network"], line["attend_to"]), {})
        of_seeds[line["seed"]] = line["exact_match"]
    found = {}
    for (kind, attend_to), own in runs.items():
        peer = runs.get((peer_of(kind), attend_to), {})
        if seeds := own.keys() & peer.keys():
            total, other = (sum(x[seed] for seed in seeds) for x in (own, peer))
            found[kind, attend_to] = total / other
    return found


def main(argv=None):
    """Runs what matches and is not there yet, and records it; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args(argv)
    chosen = [
        (kind, attend_to)
        for kind, attend_to in itertools.product(LAYERS, ATTEND_TO)
        if fnmatch.fnmatch(f"{kind} {attend_to}", arguments.pattern)
    ]
    if not chosen:
        parser.error(f"expected a pattern for one of {[*LAYERS]} and of {ATTEND_TO}")
    lines = []
    for kind, attend_to in tqdm(chosen):
        for one in filter(None, (peer_of(kind), kind)):
            rate = tuned(one, attend_to)
            asked = (settings(one, attend_to, s, rate) for s in arguments.seeds)
            lines += map(measured, asked)
    parts = parts_of_peers(lines)
    missed = 0
    for kind, attend_to in filter(parts.__contains__, chosen):
        part = parts[kind, attend_to]
        missed += part < BAR
        verdict = "MISSED" if part < BAR else "met"
        print(f"{kind} {attend_to}: {part:.4f} of its peer's, bar {BAR}  {verdict}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
