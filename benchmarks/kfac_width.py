"""What K-FAC costs as layers become wider: time, and memory.

    python benchmarks/kfac_width.py [--rounds 5]

One dense layer n -> n, n = 256 ... 4096, 128 rows, mean squared error, compiled, on
JAX. Of a step with SGD and momentum, and of K-FAC's steps in which nothing else is due,
the factors are, or the inverses are, the median milliseconds of the rounds; of K-FAC
the bytes of its state, and what the compiler reports that a step needs beside it. Last,
the slopes of their logarithms over that of n, between neighbouring widths: 2 is what
the weights cost themselves, 3 what a product of two matrices n x n does.

Lines go to benchmarks/results/kfac_width.jsonl.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import jax.numpy as jnp
import keras
import numpy as np
from interleaved import jax_step, seconds

from kzoo.optimizers import KFAC
from kzoo.zoo import results

RESULTS = Path(__file__).parent / "results" / "kfac_width.jsonl"
WIDTHS = (256, 512, 1024, 2048, 4096)
ROWS, NEVER = 128, 10**6
# What is due at a step -> the periods of factors and inverses.
DUE = {
    "sgd": None,
    "none": (NEVER, NEVER),
    "factors": (1, NEVER),
    "inverses": (NEVER, 1),
}


def step(width, periods):
    """A step, its model, and what the compiler made."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((width,)), keras.layers.Dense(width)])
    if periods is None:
        optimizer = keras.optimizers.SGD(1e-3, momentum=0.9)
    else:
        factors, inverses = periods
        optimizer = KFAC(
            model,
            learning_rate=1e-3,
            factor_update_period=factors,
            inverse_update_period=inverses,
        )
    model.compile(optimizer, "mse", jit_compile=True)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, ROWS, width)).astype("float32")
    run, _, compiled = jax_step(model, (jnp.asarray(x), jnp.asarray(y)))
    return run, model, compiled


def measured(width, rounds):
    """The record of a width."""
    record = {"claim": f"kfac_width_{width}", "width": width, "rows": ROWS}
    for due, periods in DUE.items():
        run, model, compiled = step(width, periods)
        seconds(run, 4)  # The first three invert in any case.
        times = [seconds(run, 3) for _ in range(rounds)]
        record[f"milliseconds_{due}"] = round(1e3 * float(np.median(times)), 4)
        state = sum(v.value.nbytes for v in model.optimizer.variables)
        record[f"state_bytes_{due}"] = state
        record[f"step_bytes_{due}"] = compiled.memory_analysis().temp_size_in_bytes
    return {**record, "rounds": rounds}


def main(argv=None):
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(argv).rounds
    records = []
    for width in WIDTHS:
        record = measured(width, rounds)
        times = ", ".join(f"{due} {record[f'milliseconds_{due}']:.2f}" for due in DUE)
        print(
            f"{width:5d}: ms {times}; state MB {record['state_bytes_none'] / 1e6:.1f}"
            f", a step with inverses {record['step_bytes_inverses'] / 1e6:.1f}",
            flush=True,
        )
        records.append(record)
    for i, record in enumerate(records):
        record["slopes"] = {
            name: round(float(np.log2(record[name] / records[i - 1][name])), 2)
            for name in record
            if i and name.startswith(("milliseconds", "state_bytes", "step_bytes"))
        }
        command = "python benchmarks/kfac_width.py"
        results.append(RESULTS, {"command": command, **record})
        print(record["width"], record["slopes"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
