"""Reversible layers as language models of characters, against GRU and LSTM.

    python benchmarks/language_model.py [PATTERN] [--updates N] [--seeds 0 1]

One layer between tied embeddings, about a million parameters whichever it is, learns
the characters of Python's standard library by truncated backpropagation with carried
state. Each has the same number of updates by Adam, less than one epoch, so that
nothing needs to be dropped. Half the mean square of the layer's outputs is added to the
loss, and with the weight of one step of them that of the states it ends in, which Keras
counts as outputs. RevLSTM's gates σ are at most 0.97, so that its states, to which each
step adds, stay below 45; and its biases are such that at first little of h is kept and
much of c, as in LSTM. The learning rates of GRU and LSTM, and of the reversible layers
that may forget least, are each the best of a few by bits per character on the
validation split; the others have one.

Bits per character of the validation and test splits, the memory that the compiler
reports for the training step and for the layer's part of it, and the seconds of
training are appended to benchmarks/results/language_model.jsonl; lines that are there
are not run again.
"""

import argparse
import fnmatch
import math
import os
import sys
import time
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from reversible_memory import compiled_bytes

from kzoo.layers import RevGRU, RevLSTM
from kzoo.zoo import results
from kzoo.zoo.datasets import text_streams
from kzoo.zoo.models.language_model import ResetStates, language_model, take_weights

RESULTS = Path(__file__).parent / "results" / "language_model.jsonl"
ROWS, STEPS = 16, 64
# Streams of a test, of about 1,250 characters; and updates between states of zero, so
# that in training sequences are about as long.
TEST_ROWS, EPOCH = 512, 25
UPDATES = 2000
# The part of them in which the learning rate rises.
WARMUP = 0.2
SEEDS = (0, 1)
# α, by which the mean square of outputs is multiplied and added to the loss; and so is
# that of the last states, by α / STEPS.
ACTIVITY = 0.5
# Within how much of its peer's bits per character a reversible layer is to be.
BAR = 1.02


@keras.saving.register_keras_serializable(package="kzoo_benchmarks")
def sigmoid_to_97(x):
    """Gates that never keep all of a state."""
    return 0.97 * keras.activations.sigmoid(x)


@keras.saving.register_keras_serializable(package="kzoo_benchmarks")
def low_p(shape, dtype=None):
    """Biases of RevLSTM's i, g, f, o and p, for both halves: -2 of p, 0 of others."""
    of_gates = np.repeat([0, 0, 0, 0, -2], shape[0] // 10)
    return keras.ops.convert_to_tensor(np.tile(of_gates, 2), dtype)


# kind -> (layer, its options, size of embeddings, units with which there are as many
# parameters). Of 64 and 128 each kind has the size that is best on the validation
# split; RevGRU was tried with 128 alone.
KINDS = {
    "gru": (keras.layers.GRU, {"use_cudnn": False}, 128, 512),
    "lstm": (keras.layers.LSTM, {"use_cudnn": False}, 128, 436),
    "rev_gru": (RevGRU, {"state_bits": 23}, 128, 692),
    "rev_lstm": (
        RevLSTM,
        {
            "state_bits": 23,
            "unit_forget_bias": True,
            "recurrent_activation": sigmoid_to_97,
            "bias_initializer": low_p,
        },
        64,
        578,
    ),
}
# claim -> (kind, max_forget_bits of a reversible layer)
CLAIMS = {
    "gru": ("gru", None),
    "lstm": ("lstm", None),
    **{
        f"{kind}_{bits or 'unlimited'}": (kind, bits)
        for kind in ("rev_gru", "rev_lstm")
        for bits in (2, 3, 5, None)
    },
}
# By which factor bits per character may exceed others, and be about as good.
NEAR = 1.01
# The learning rate that in 900 updates was the best of 0.006, 0.012 and 0.024 for LSTM
# and RevGRU at all limits; and those that some claims have the choice of.
RATE = 1.2e-2
RATES = {
    "gru": (3e-3, 6e-3, 1.2e-2),
    "lstm": (6e-3, 9e-3, 1.2e-2, 2.4e-2),
    "rev_gru_2": (6e-3, 1.2e-2),
    "rev_lstm_2": (6e-3, 9e-3, 1.2e-2, 1.8e-2),
}


def made(claim):
    """A claim's layer, as a function of units and options; and the sizes."""
    kind, bits = CLAIMS[claim]
    layer, options, embedding, units = KINDS[kind]
    if kind.startswith("rev"):
        options = {**options, "max_forget_bits": bits}
    square = keras.regularizers.L2(ACTIVITY / (STEPS * units))
    return partial(layer, activity_regularizer=square, **options), embedding, units


@cache
def streams(rows, split):
    """Batches of a split, and the number of ids."""
    found, characters = text_streams(splits=("train", split), rows=rows, steps=STEPS)
    return found[split], 1 + len(characters)


def network(claim, rows, vocabulary):
    """The language model, which drops nothing."""
    layer, embedding, units = made(claim)
    drops = ("embedding", "input", "hidden", "output")
    return language_model(
        vocabulary,
        embedding=embedding,
        units=units,
        layers=1,
        recurrent=layer,
        project=True,
        rows=rows,
        weight_drop=0.0,
        **{f"{where}_dropout": 0.0 for where in drops},
    )


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def bits_per_character(trained, claim, split):
    """A trained model's bits per character of a split, cut into streams of its own."""
    batches, vocabulary = streams(TEST_ROWS, split)
    model = network(claim, TEST_ROWS, vocabulary)
    take_weights(model, trained)
    model.compile(
        loss=cross_entropy(),
        metrics=[keras.metrics.SparseCategoricalCrossentropy("nll", from_logits=True)],
        jit_compile=True,
    )
    found = model.evaluate(
        batches, callbacks=[ResetStates()], verbose=0, return_dict=True
    )
    return found["nll"] / math.log(2)


@cache
def memory(claim):
    """Bytes that the compiler reports for a training step, and for the layer in it.

    The first is what the gradient of the model's cross-entropy needs beside weights,
    ids and the weights' gradients; the second what that of the layer alone does, of
    which only the last output is returned.
    """
    import jax

    layer, embedding, units = made(claim)
    _, vocabulary = streams(ROWS, "train")
    model = network(claim, ROWS, vocabulary)
    others = [
        jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.non_trainable_variables
    ]

    def loss(weights, others, x, y):
        logits, others = model.stateless_call(weights, others, x, training=True)
        return cross_entropy()(y, logits), others

    weights = [
        jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.trainable_variables
    ]
    ids = jax.ShapeDtypeStruct((ROWS, STEPS), "int32")
    step = jax.jit(jax.grad(loss, has_aux=True)).lower(weights, others, ids, ids)
    return {
        "step_bytes": step.compile().memory_analysis().temp_size_in_bytes,
        "layer_bytes": compiled_bytes(layer(units), (ROWS, STEPS, embedding)),
    }


def measured(claim, rate, seed, updates):
    """The record of a run, from the file if it is there."""
    kind, bits = CLAIMS[claim]
    _, options, embedding, units = KINDS[kind]
    record = {
        "command": f"python benchmarks/language_model.py {claim}",
        "claim": claim,
        "backend": keras.backend.backend(),
        "dtype": keras.config.dtype_policy().name,
        "jit_compile": True,
        "dataset": "python_source",
        "layer": kind,
        "options": {
            name: getattr(value, "__name__", value) for name, value in options.items()
        },
        "max_forget_bits": bits,
        "units": units,
        "embedding": embedding,
        "rows": ROWS,
        "steps": STEPS,
        "updates": updates,
        "updates_between_resets": EPOCH,
        "optimizer": "Adam, linear warm-up, half a cosine, gradients of norm 0.25 at "
        "most",
        "warmup": WARMUP,
        "activity": ACTIVITY,
        "learning_rate": rate,
        "seed": seed,
    }
    for line in results.read(RESULTS):
        if all(line.get(key) == value for key, value in record.items()):
            return line
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    batches, vocabulary = streams(ROWS, "train")
    model = network(claim, ROWS, vocabulary)
    warmup = round(WARMUP * updates)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, updates - warmup, warmup_target=rate, warmup_steps=warmup
    )
    optimizer = keras.optimizers.Adam(schedule, beta_2=0.99, global_clipnorm=0.25)
    model.compile(optimizer, cross_entropy(), jit_compile=True)
    start, processor = time.perf_counter(), time.process_time()
    model.fit(
        batches.repeat(),
        steps_per_epoch=EPOCH,
        epochs=updates // EPOCH,
        shuffle=False,
        callbacks=[ResetStates()],
        verbose=0,
    )
    record["seconds"] = round(time.perf_counter() - start, 1)
    record["processor_seconds"] = round(time.process_time() - processor, 1)
    record["parameters"] = sum(math.prod(v.shape) for v in model.trainable_variables)
    record["bits_per_character"] = {
        split: round(bits_per_character(model, claim, split), 4)
        for split in ("validation", "test")
    }
    record |= {"peer": peer_of(claim), "bar": BAR if peer_of(claim) else None}
    record |= memory(claim)
    results.append(RESULTS, record)
    return record


def tuned(claim, updates, seeds):
    """The learning rate that is best on the validation split.

    Over all seeds, of those that are about as good as the best from the first one: what
    tells neighbours apart is less than what tells seeds apart.
    """

    def score(rate, seeds):
        lines = [measured(claim, rate, seed, updates) for seed in seeds]
        found = np.mean([line["bits_per_character"]["validation"] for line in lines])
        print(f"{claim:20s} rate {rate:g} seeds {seeds}  {found:.4f}", flush=True)
        return found

    if claim not in RATES:
        return RATE
    first = {rate: score(rate, seeds[:1]) for rate in RATES[claim]}
    near = [rate for rate in first if first[rate] <= NEAR * min(first.values())]
    return min(near, key=lambda rate: score(rate, seeds))


def main(argv=None):
    """Runs what is not recorded yet, and prints a table; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pattern", nargs="?", default="*", help="such as rev_gru*")
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    arguments = parser.parse_args(argv)
    claims = fnmatch.filter(CLAIMS, arguments.pattern)
    if not claims:
        parser.error(f"expected a pattern that one of {list(CLAIMS)} matches")
    best = {c: tuned(c, arguments.updates, arguments.seeds) for c in claims}
    lines = []
    for seed in arguments.seeds:
        for claim in claims:
            line = measured(claim, best[claim], seed, arguments.updates)
            lines.append(line)
            print(
                f"{claim:20s} seed {seed}  {line['bits_per_character']}  "
                f"{line['seconds']:.0f} s  {line['step_bytes'] / 1e6:.1f} MB",
                flush=True,
            )
    missed = 0
    for claim in claims:
        bits, other = (mean_bits(lines, name) for name in (claim, peer_of(claim)))
        verdict = ""
        if other is not None:
            is_missed = bits > BAR * other
            missed += is_missed
            verdict = f"{bits / other:.4f} of its peer's, bar {BAR}  " + (
                "MISSED" if is_missed else "met"
            )
        print(f"{claim:20s} {bits:.4f} bits per character  {verdict}")
    return 1 if missed else 0


def peer_of(claim):
    """The claim of Keras's layer that a reversible one is compared with, or None."""
    kind, _ = CLAIMS[claim]
    return kind.removeprefix("rev_") if kind.startswith("rev_") else None


def mean_bits(lines, claim):
    """The mean over seeds of the test's bits per character; None without a line."""
    found = [
        line["bits_per_character"]["test"] for line in lines if line["claim"] == claim
    ]
    return np.mean(found) if found else None


if __name__ == "__main__":
    sys.exit(main())
