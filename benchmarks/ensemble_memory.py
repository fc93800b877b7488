"""Memory of compiled steps, as XLA's own report has it, against what is replaced.

    KERAS_BACKEND=jax python benchmarks/ensemble_memory.py [PATTERN] [--no-record]

Each claim compiles a step of the method and one of its peer, for the same inputs, and
asks the compiler what they need: for their arguments (weights, optimizer state and
inputs), for results that are not written over arguments, and for what lies between.
The ratio of the sums, method to peer, is printed and appended to
benchmarks/results/ensemble_memory.jsonl, beside the bar. Nothing is run, so that the
figures do not depend on the machine's load.
"""

import argparse
import fnmatch
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import keras
from step_time import ensemble_networks

from kzoo.zoo import build, results

RESULTS = Path(__file__).parent / "results" / "ensemble_memory.jsonl"


def needs(model, x, y=None):
    """Bytes that a call of a model needs or, with targets y, a training step.

    Args:
        model: A model; to train, compiled.
        x: Shape of the inputs.
        y: Shape of the targets.

    Returns:
        dict of `arguments`, `results` and `between`.
    """
    x = jax.ShapeDtypeStruct(x, "float32")
    state = [model.trainable_variables, model.non_trainable_variables]
    if y is None:

        def step(state, x):
            return model.stateless_call(*state, x, training=False)[0]

        arguments, donated = (x,), ()
    else:
        model.optimizer.build(model.trainable_variables)
        y = jax.ShapeDtypeStruct(y, "float32")
        model._symbolic_build(data_batch=(keras.KerasTensor(x.shape),) * 2)
        state += [model.optimizer.variables, model.metrics_variables]
        step, arguments, donated = model.train_step, ((x, y, None),), (0,)
    state = tuple(
        [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in part] for part in state
    )
    compiled = jax.jit(step, donate_argnums=donated).lower(state, *arguments).compile()
    found = compiled.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "between": found.temp_size_in_bytes,
    }


def separate(kind, members, train=False):
    """A BatchEnsemble against M separate models, of the same rows."""
    together, stacked, shape = ensemble_networks(kind, members)
    rows = 1 if kind == "dense" else 8
    found = []
    for model, x in (
        (together, (members * rows, *shape)),
        (stacked, (rows, members, *shape)),
    ):
        model.compile(keras.optimizers.SGD(0.01), "mse")
        found.append(needs(model, x, x if train else None))
    return *found, {"members": members, "rows": members * rows}


def weights_of_wide_resnet(members):
    """Weights of WRN-28-10 as a BatchEnsemble against those of M networks."""
    together = build("wide_resnet28_10_batch_ensemble_cifar10", ensemble_size=members)
    one = build("wide_resnet28_10_cifar10")
    method, peer = (
        {"arguments": sum(v.value.nbytes for v in model.variables)}
        for model in (together, one)
    )
    peer["arguments"] *= members
    facts = {
        "parameters": together.count_params(),
        "parameters_of_peer": members * one.count_params(),
    }
    return method, peer, {"members": members, **facts}


# claim -> (what compiles it, the bar on its ratio or None where it is only reported)
CLAIMS = {
    **{
        f"batch_ensemble_{kind}_{'train' if train else 'predict'}_{m}": (
            partial(separate, kind, m, train),
            None,
        )
        for kind in ("dense", "wide_block")
        for train in (False, True)
        for m in (4, 8, 16)
    },
    **{
        f"batch_ensemble_wide_resnet_weights_{m}": (
            partial(weights_of_wide_resnet, m),
            1.2 / m,
        )
        for m in (4, 8, 16)
    },
}


def main(argv=None):
    """Compiles the claims that match, prints and records them; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args(argv)
    names = fnmatch.filter(CLAIMS, arguments.pattern)
    if not names:
        parser.error(f"expected a pattern that matches one of {list(CLAIMS)}")
    missed = []
    for name in names:
        keras.utils.clear_session()
        compare, bar = CLAIMS[name]
        method, peer, facts = compare()
        ratio = sum(method.values()) / sum(peer.values())
        record = {
            "command": f"python benchmarks/ensemble_memory.py {name}",
            "claim": name,
            "backend": keras.backend.backend(),
            **facts,
            "bytes": method,
            "peer_bytes": peer,
            "ratio": round(ratio, 4),
            "bar": bar and round(bar, 4),
        }
        if not arguments.no_record:
            results.append(RESULTS, record)
        said = "" if bar is None else f"  bar {bar:.3f}"
        print(
            f"{name:42s} {sum(method.values()) / 1e6:10.1f} MB  peer "
            f"{sum(peer.values()) / 1e6:10.1f} MB  ratio {ratio:.3f}{said}",
            flush=True,
        )
        if bar is not None and ratio > bar:
            missed.append(name)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
