"""A population in one pass against members perturbed one at a time.

    python benchmarks/evolution_strategies.py [PATTERN] [--rounds 20] [--no-record]

Both sides draw a population's perturbations, antithetic ones, and evaluate each member
on its own rows. The method is `EvolutionStrategies`: one base perturbation and signs.
Its peer draws each pair's own perturbation of all weights, in a compiled loop, and uses
it for both members; it runs as it is fastest: with or without XLA, some pairs at a time
or one, with the members' weights formed or the two products added. A second peer draws
nothing: it slices its perturbations from a table of noise, as Salimans et al. do.

Rounds are interleaved; the median of peer's time / method's and its quartiles are
printed and appended to benchmarks/results/evolution_strategies.jsonl, beside the bar.
"""

import argparse
import fnmatch
import itertools
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from interleaved import measure, seconds
from keras import ops

from kzoo.layers.ops.random import normal, nth_seed
from kzoo.zoo import EvolutionStrategies, results

RESULTS = Path(__file__).parent / "results" / "evolution_strategies.jsonl"
STDDEV = 0.02
TABLE = 1 << 24  # numbers
LAYOUTS = list(itertools.product((1, 8), ("weights", "products"), (True, False)))

# claim -> (layer sizes, members, rows of each, noise of the peer, the bar on how many
# times faster the method is or None where it is only reported)
CLAIMS = {
    "policy": ((376, 256, 256, 17), 1024, 1, "drawn", 20),
    "policy_table": ((376, 256, 256, 17), 1024, 1, "table", None),
    "policy_16_rows": ((376, 256, 256, 17), 1024, 16, "drawn", None),
    "small_policy": ((24, 64, 64, 4), 1024, 1, "drawn", None),
    "large_policy": ((376, 1024, 1024, 17), 256, 1, "drawn", None),
}


def policy(sizes):
    """A perceptron with tanh between its layers."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(n, "tanh") for n in sizes[1:-1]]
    layers = [keras.Input(sizes[:1]), *layers, keras.layers.Dense(sizes[-1])]
    return keras.Sequential(layers)


def in_one_pass(model, x, population):
    """Functions that evaluate the whole population, by whether XLA compiles them."""
    members = EvolutionStrategies(model, population, STDDEV, seed=0)
    x = tf.constant(x)

    def evaluate(jit):
        run = tf.function(lambda: members._acted(x), jit_compile=jit)
        return lambda: run().numpy()

    return {jit: evaluate(jit) for jit in (True, False)}


def one_at_a_time(model, x, population, noise, pairs, layout, jit):
    """A function that evaluates the population by a loop over its pairs.

    Args:
        model: The policy.
        x: Rows, member-major.
        population: N.
        noise: `"drawn"`, or `"table"`.
        pairs: How many pairs an iteration evaluates.
        layout: Whether it forms `"weights"` or adds `"products"`.
        jit: Whether XLA compiles it.
    """
    layers = [w for w in model.layers if w.weights]
    shapes = [tuple(v.shape) for w in layers for v in (w.kernel, w.bias)]
    sizes = [int(np.prod(shape)) for shape in shapes]
    numbers = sum(sizes)
    steps = population // (2 * pairs)
    x = tf.constant(x.reshape(steps, pairs, 2, -1, x.shape[-1]))
    table = tf.Variable(normal((TABLE if noise == "table" else 1,), 0))
    seed = tf.Variable(np.zeros(2, "uint32"))
    sign = STDDEV * np.array([1.0, -1.0], "float32").reshape(1, 2, 1, 1)

    def drawn(i):
        pair = ops.bitwise_xor(seed, ops.stack([ops.cast(i, "uint32"), np.uint32(0)]))
        pair = nth_seed(pair, 1)
        if noise == "drawn":
            return normal((pairs, numbers), pair)
        start = tf.random.stateless_uniform(
            (pairs,), tf.cast(pair, "int64"), 0, TABLE - numbers, "int32"
        )
        return ops.stack([tf.slice(table, [start[p]], [numbers]) for p in range(pairs)])

    def step(element):
        i, h = element  # [pairs, 2, rows, inputs]
        parts = tf.split(drawn(i), sizes, axis=1)
        for k, layer in enumerate(layers):
            kernel = ops.reshape(parts[2 * k], (pairs, 1, *shapes[2 * k]))
            bias = ops.reshape(parts[2 * k + 1], (pairs, 1, 1, -1))
            if layout == "weights":
                y = ops.matmul(h, layer.kernel + sign * kernel)
            else:
                rows = ops.reshape(h, (pairs, -1, h.shape[-1]))
                shared = ops.reshape(rows, (-1, h.shape[-1])) @ layer.kernel
                own = ops.reshape(ops.matmul(rows, kernel[:, 0]), (*h.shape[:-1], -1))
                y = ops.reshape(shared, (*h.shape[:-1], -1)) + sign * own
            h = layer.activation(y + layer.bias + sign * bias)
        return h

    run = tf.function(lambda: ops.map(step, (tf.range(steps), x)), jit_compile=jit)
    return lambda: run().numpy()


def best(candidates):
    """The fastest of some functions, by key."""
    times = {}
    for key, run in candidates.items():
        seconds(run, 2)  # compile and warm up
        times[key] = min(seconds(run, 1) for _ in range(3))
    return min(times, key=times.get)


def main(argv=None):
    """Measures the claims that match, prints and records them; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--members", type=int, help="in place of each claim's")
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args(argv)
    names = fnmatch.filter(CLAIMS, arguments.pattern)
    if not names:
        parser.error(f"expected a pattern that matches one of {list(CLAIMS)}")
    missed = []
    for name in names:
        sizes, population, rows, noise, bar = CLAIMS[name]
        population = arguments.members or population
        model = policy(sizes)
        x = np.random.default_rng(0).normal(size=(population * rows, sizes[0]))
        x = x.astype("float32")
        methods = in_one_pass(model, x, population)
        jit = best(methods)
        peers = {
            layout: one_at_a_time(model, x, population, noise, *layout)
            for layout in LAYOUTS
        }
        pairs, layout, peer_jit = chosen = best(peers)
        times, steps = measure(methods[jit], peers[chosen], arguments.rounds)
        low, ratio, high = np.percentile(times[:, 1] / times[:, 0], [25, 50, 75])
        here, there = (float(t) for t in np.median(times, 0))
        record = {
            "command": f"python benchmarks/evolution_strategies.py {name}",
            "claim": name,
            "backend": keras.backend.backend(),
            "dtype": "float32",
            "shape": "->".join(map(str, sizes)),
            "parameters": model.count_params(),
            "population": population,
            "rows_per_member": rows,
            "stddev": STDDEV,
            "jit_compile": jit,
            "peer": f"noise {noise}, {pairs} pairs at a time, by {layout}",
            "peer_jit_compile": peer_jit,
            "rounds": arguments.rounds,
            "steps_per_round": steps,
            "members_per_second": round(population / here),
            "peer_members_per_second": round(population / there),
            "times_faster": round(float(ratio), 2),
            "times_faster_quartiles": [round(float(low), 2), round(float(high), 2)],
            "bar": bar,
        }
        if not arguments.no_record:
            results.append(RESULTS, record)
        print(
            f"{name:16s} {record['shape']}, {population} members of {rows} rows: "
            f"{population / here:,.0f} a second  peer ({record['peer']}) "
            f"{population / there:,.0f}  {ratio:.1f} times faster "
            f"[{low:.1f}, {high:.1f}]"
            + (f"  bar {bar}  {'met' if ratio >= bar else 'MISSED'}" if bar else ""),
            flush=True,
        )
        if bar and ratio < bar:
            missed.append(name)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
