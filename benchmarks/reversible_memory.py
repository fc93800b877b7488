"""Memory of one training step against that of plain Keras peers.

    python benchmarks/reversible_memory.py [PATTERN] [--steps 100 1000] [--rows 128]
    python benchmarks/reversible_memory.py --figure

For each claim and length of sequence, what a compiled step needs beside its arguments
(weights and inputs) and results (weights' gradients) is read from the compiler's own
report, by JAX. With --resident it is measured instead: by how much the step, already
compiled, raises the resident memory of a fresh process at most, results included; on
Linux. With few rows the copies of weights that a step multiplies by, and the sums of
their gradients, are most of what it needs. The figures, their ratio and the bar on it
are printed and appended to benchmarks/results/reversible_memory.jsonl (not with
--no-record), from which --figure draws docs/reversible_memory.png.
"""

import argparse
import ctypes
import fnmatch
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import ops

from kzoo.layers import RevGRU, RevLSTM
from kzoo.zoo import results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "reversible_memory.jsonl"
ROWS, FEATURES, UNITS = 128, 32, 256
STEPS = [100, 1000, 10_000]


def remat(cell):
    """Keras's loop, which keeps the states of all steps, and all else of one."""
    call = cell.call

    def anew(inputs, states, training=False):
        return keras.remat(partial(call, training=training))(inputs, states)

    cell.call = anew
    return cell


def recurrent(kind, bits=3, whole=False, peer="plain", rows=ROWS):
    """RevGRU or RevLSTM against Keras's layer.

    Args:
        kind: "GRU" or "LSTM".
        bits: The limit on what is forgotten, in bits a step and unit.
        whole: Whether the outputs of all steps are returned.
        peer: "plain" or "remat", where Keras computes each step anew.
        rows: How many sequences.

    Returns:
        The layer, its peer, and the facts of the measurement.
    """
    layer = {"GRU": RevGRU, "LSTM": RevLSTM}[kind]
    method = layer(UNITS, max_forget_bits=bits, return_sequences=whole)
    if peer == "remat":
        cell = getattr(keras.layers, f"{kind}Cell")(UNITS)
        other = keras.layers.RNN(remat(cell), return_sequences=whole)
    else:
        other = getattr(keras.layers, kind)(
            UNITS, use_cudnn=False, return_sequences=whole
        )
    facts = {
        "rows": rows,
        "features": FEATURES,
        "units": UNITS,
        "max_forget_bits": bits,
        "peer": f"keras {kind}" + (", each step keras.remat" * (peer == "remat")),
        "forgotten_bits": round(forgotten_bits(layer, bits), 3),
    }
    return method, other, facts


def forgotten_bits(layer, bits):
    """What untrained gates forget on average, a step and unit: -log2 z, summed."""
    rows, steps = 16, 100
    keras.utils.set_random_seed(0)
    layer = layer(UNITS, max_forget_bits=bits)
    x = np.random.default_rng(0).normal(size=(steps, rows, FEATURES))
    layer.build((rows, steps, FEATURES))
    cell, total = layer.cell, 0.0
    weights = cell.cast(cell._weights_of_couplings())
    parts = cell.parts_of(cell.get_initial_state(rows))
    for x_t in ops.convert_to_tensor(x.astype("float32")):
        for number, coupling in enumerate(cell.couplings):
            reads = [parts[part] for part in coupling.reads]
            v, gate = cell.couple(number, x_t, reads, weights[number])
            z = cell.fixed.value(cell.fixed.gate(gate))
            total -= float(ops.sum(ops.log2(z)))
            v = (1 - z) * v if cell.mixes else v
            parts[coupling.part] = z * parts[coupling.part] + v
    return total / (steps * rows * UNITS)


# claim -> (what builds it, the least times less memory by the compiler's report, or
# None where it is only reported)
CLAIMS = {
    "rev_gru_2": (partial(recurrent, "GRU", 2), 30),
    "rev_gru_3": (partial(recurrent, "GRU", 3), 20),
    "rev_gru_5": (partial(recurrent, "GRU", 5), None),
    "rev_gru_unlimited": (partial(recurrent, "GRU", None), None),
    "rev_gru_3_remat": (partial(recurrent, "GRU", 3, peer="remat"), None),
    "rev_gru_3_whole": (partial(recurrent, "GRU", 3, whole=True), None),
    "rev_lstm_2": (partial(recurrent, "LSTM", 2), 30),
    "rev_lstm_3": (partial(recurrent, "LSTM", 3), 20),
    "rev_lstm_3_remat": (partial(recurrent, "LSTM", 3, peer="remat"), None),
    "rev_lstm_3_whole": (partial(recurrent, "LSTM", 3, whole=True), None),
}


def loss_of(layer, weights, x):
    """A loss of a layer's outputs in training."""
    others = [v.value for v in layer.non_trainable_variables]
    y, _ = layer.stateless_call(weights, others, x, training=True)
    return ops.sum(ops.square(y))


def compiled_bytes(layer, shape):
    """What the compiler reports that a step needs beside arguments and results."""
    import jax

    layer.build(shape)
    x = jax.ShapeDtypeStruct(shape, "float32")
    return bytes_of_gradient(partial(loss_of, layer), layer, x)


def bytes_of_gradient(loss, layer, x):
    """The same for the gradient of a loss of weights and inputs, by the weights."""
    step = compiled_gradient(loss, layer, x)
    return step.memory_analysis().temp_size_in_bytes


def compiled_gradient(loss, layer, x):
    """The compiled gradient of a loss of weights and inputs, by the weights."""
    import jax

    weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in layer.trainable_weights]
    return jax.jit(jax.grad(loss)).lower(weights, x).compile()


def resident_bytes(name, which, rows, steps):
    """By how much a step raises the peak resident memory of a fresh process."""
    sizes = ["--rows", str(rows), "--steps", str(steps)]
    done = subprocess.run(
        [sys.executable, __file__, name, "--child", which, *sizes],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(layer, shape):
    """Compiles a step, and runs it with the peak counted from then on."""
    import jax

    layer.build(shape)
    weights = [v.value for v in layer.trainable_weights]
    x = jax.random.normal(jax.random.key(0), shape)
    step = compiled_gradient(partial(loss_of, layer), layer, x)
    # What compiling has left free goes back to the system, and 5 sets back the peak.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    jax.block_until_ready(step(weights, x))
    return resident("VmHWM") - before


def resident(what):
    """Bytes of resident memory: those of now (`VmRSS`) or most so far (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(what))
    return 1024 * int(line.split()[1])


def figure(path=ROOT / "docs" / "reversible_memory.png"):
    """Draws the newest bytes against steps: what the compiler says, and resident."""
    from matplotlib.figure import Figure

    drawn = Figure((9, 8), layout="constrained")
    sources = (("compiler", ROWS), ("peak resident memory", 16))
    for row, source in zip(drawn.subplots(2, 2, sharey="row"), sources, strict=True):
        for axes, kind in zip(row, ("gru", "lstm"), strict=True):
            lines = {}
            for r in results.read(RESULTS):
                if (r["source"], r["rows"]) != source or r["claim"].endswith("_whole"):
                    continue
                if r["claim"].startswith(f"rev_{kind}"):
                    peer = r["peer"].removeprefix("keras ")
                    lines.setdefault(peer, {})[r["steps"]] = r["peer_bytes"]
                    if not r["claim"].endswith("_remat"):  # The same layer as without.
                        lines.setdefault(r["claim"], {})[r["steps"]] = r["bytes"]
            for name, points in sorted(lines.items()):
                steps, values = zip(*sorted(points.items()), strict=True)
                megabytes = [value / 1e6 for value in values]
                axes.plot(steps, megabytes, "o-", lw=1, ms=3, label=name)
            axes.set(xscale="log", yscale="log", xlabel="steps")
            axes.legend(fontsize=8)
        row[0].set(ylabel=f"MB of a step: {source[0]}, {source[1]} rows")
    drawn.savefig(path, dpi=120)


def main(argv=None):
    """Measures the claims that match, prints and records them; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--figure", action="store_true")
    parser.add_argument("--child", choices=("method", "peer"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.figure:
        figure()
        return 0
    names = fnmatch.filter(CLAIMS, arguments.pattern)
    if not names:
        parser.error(f"expected a pattern that matches one of {list(CLAIMS)}")
    if arguments.child:
        layer = CLAIMS[names[0]][0]()[arguments.child == "peer"]
        print(child(layer, (arguments.rows, arguments.steps[0], FEATURES)))
        return 0
    missed = []
    for name in names:
        build, bar = CLAIMS[name]
        for steps in arguments.steps:
            *pair, facts = build(rows=arguments.rows)
            if arguments.resident:
                pair = [
                    resident_bytes(name, which, arguments.rows, steps)
                    for which in ("method", "peer")
                ]
                source = "peak resident memory"
            else:
                shape = (arguments.rows, steps, FEATURES)
                pair = [compiled_bytes(layer, shape) for layer in pair]
                source = "compiler"
            ratio = pair[1] / pair[0]
            own_bar = None if arguments.resident else bar
            record = {
                "command": f"python benchmarks/reversible_memory.py {name}"
                + f" --rows {arguments.rows}" * (arguments.rows != ROWS)
                + " --resident" * arguments.resident,
                "claim": name,
                "backend": "jax",
                "dtype": keras.config.dtype_policy().name,
                "jit_compile": True,
                "source": source,
                "steps": steps,
                **facts,
                "bytes": pair[0],
                "peer_bytes": pair[1],
                "times_less": round(ratio, 2),
                "bar": own_bar,
            }
            if not arguments.no_record:
                results.append(RESULTS, record)
            verdict = ""
            if own_bar:
                verdict = f"  bar {own_bar}  {'met' if ratio >= own_bar else 'MISSED'}"
                missed += [name] * (ratio < own_bar)
            print(
                f"{name:20s} {steps:6d} steps  {pair[0] / 1e6:9.2f} MB  peer "
                f"{pair[1] / 1e6:9.2f} MB  {ratio:7.1f} times less{verdict}",
                flush=True,
            )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
