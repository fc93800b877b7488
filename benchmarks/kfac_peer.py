"""K-FAC's steps and factors against kfac-jax's, of the same networks on JAX.

    python3 -m venv .peers/kfac_jax
    .peers/kfac_jax/bin/pip install kfac-jax keras "jax<0.8" tfp-nightly -e . --no-deps
    .peers/kfac_jax/bin/python benchmarks/kfac_peer.py [--rounds 20] [--no-record]

(kfac-jax 0.0.8 does not know JAX from 0.8 on, and needs tfp-nightly there; what both
run on is in the records.) A network is one Keras model of kzoo's, which kfac-jax is
given as a function of its weights; data, periods, damping, rates and the sampled
Fisher information are the same. Steps are timed turn by turn (interleaved.py): of
kfac-jax its optimizer's `step`, of kzoo the compiled training step of Keras, metrics
and all. The bar is kfac-jax's time, 1.0.

Factors are those of the first batch with the empirical Fisher information, where both
have the same labels. As what A ⊗ G is divided by may be in either factor, the two are
compared by the product of their traces, and each divided by its trace; the largest
difference of any number, as a share of the largest number, has the bar of 1e-4.
kfac-jax divides its empirical factors by the number of rows once more, as it says, and
has an output's weight twice, as a factor of either gradient; its convolution's factors
are averages over positions, by whose number its block multiplies. That is taken out.

Lines go to benchmarks/results/kfac_peer.jsonl.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import kfac_jax
import numpy as np
from interleaved import compared, jax_step

from kzoo.optimizers import KFAC
from kzoo.zoo import results
from kzoo.zoo.models.lenet import lenet5

RESULTS = Path(__file__).parent / "results" / "kfac_peer.jsonl"
COMMAND = "python benchmarks/kfac_peer.py"
STEP = {"learning_rate": 1e-3, "momentum": 0.9}
DAMPING = 0.01
# Updates from one measurement of the factors, and one inversion, to the next.
PERIODS = ((1, 5), (10, 100))


def lenet():
    """LeNet-5 for 28x28 images, and its loss."""
    return lenet5((28, 28, 1), 10, padding="same"), (28, 28, 1), "categorical"


def autoencoder():
    """784-1000-500-250-30 and back, with Bernoulli's likelihood."""
    model = keras.Sequential([keras.Input((784,))])
    for units in (1000, 500, 250):
        model.add(keras.layers.Dense(units, "tanh"))
    model.add(keras.layers.Dense(30))
    for units in (250, 500, 1000):
        model.add(keras.layers.Dense(units, "tanh"))
    model.add(keras.layers.Dense(784))
    return model, (784,), "bernoulli"


NETWORKS = {"lenet5": lenet, "autoencoder": autoencoder}


def batch_of(shape, kind, rows):
    """Inputs and labels drawn at random."""
    random = np.random.default_rng(0)
    if kind == "bernoulli":
        x = random.uniform(size=(rows, *shape)).astype("float32")
        return jnp.asarray(x), jnp.asarray(x)
    x = random.integers(0, 256, (rows, *shape)).astype("float32")
    return jnp.asarray(x), jnp.asarray(random.integers(0, 10, rows).astype("int32"))


def ours(name, rows, periods, fisher="sampled"):
    """A function that runs one compiled step, and the optimizer's state after it."""
    keras.utils.set_random_seed(0)
    model, shape, kind = NETWORKS[name]()
    factors, inverses = periods
    optimizer = KFAC(
        model,
        damping=DAMPING,
        factor_update_period=factors,
        inverse_update_period=inverses,
        fisher=fisher,
        seed=0,
        **STEP,
    )
    losses = {
        "categorical": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "bernoulli": keras.losses.BinaryCrossentropy(from_logits=True),
    }
    model.compile(optimizer, losses[kind], jit_compile=True)
    run, held, _ = jax_step(model, batch_of(shape, kind, rows))

    def found():
        for variable, value in zip(optimizer.variables, held[0][2], strict=True):
            variable.assign(value)
        return [list(map(np.asarray, f.values())) for f in optimizer.factors.values()]

    return run, found, model


def theirs(name, rows, periods, fisher="fisher_gradients"):
    """The same of kfac-jax's optimizer."""
    keras.utils.set_random_seed(0)
    model, shape, kind = NETWORKS[name]()
    batch = batch_of(shape, kind, rows)

    def loss(weights, batch):
        x, y = batch
        logits, _ = model.stateless_call(weights, [], x, training=True)
        if kind == "categorical":
            kfac_jax.register_softmax_cross_entropy_loss(logits, targets=y)
            log_p = jax.nn.log_softmax(logits)
            return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1))
        share = 1 / logits.shape[1]
        kfac_jax.register_sigmoid_cross_entropy_loss(logits, targets=y, weight=share)
        return jnp.mean(jax.nn.softplus(logits) - y * logits)

    factors, inverses = periods
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        num_burnin_steps=0,
        estimation_mode=fisher,
        curvature_update_period=factors,
        inverse_update_period=inverses,
    )
    numbers = {name: jnp.asarray(value) for name, value in STEP.items()}
    numbers["damping"] = jnp.asarray(DAMPING)
    weights = [jnp.array(v.value) for v in model.trainable_variables]
    keys = iter(jax.random.split(jax.random.PRNGKey(0), 100_000))
    held = [weights, optimizer.init(weights, next(keys), batch), 0]

    def run():
        weights, state, step = held
        *held[:2], statistics = optimizer.step(
            weights, state, next(keys), batch=batch, global_step_int=step, **numbers
        )
        held[2] += 1
        return jax.block_until_ready(statistics["loss"])

    def found():
        states = held[1].estimator_state.blocks_states
        pairs = []
        for block, state in zip(optimizer._estimator.blocks, states, strict=True):
            a, g = (np.asarray(f.value) for f in state.factors)
            weight = 1 if kind == "categorical" else 1 / shape[0]
            scale = block.scale(state, use_cache=False) * rows / weight
            pairs.append([a, g * float(scale)])
        return pairs

    return run, found, model


def apart(one, other):
    """The largest difference of two pairs of factors, as a share."""
    one, other = ([f.reshape(f.shape[-2:]) for f in pair] for pair in (one, other))
    traces = [np.prod([np.trace(f) for f in pair]) for pair in (one, other)]
    found = [abs(traces[0] / traces[1] - 1)]
    for a, b in zip(one, other, strict=True):
        a, b = a / np.trace(a), b / np.trace(b)
        found.append(np.abs(a - b).max() / np.abs(b).max())
    return float(max(found))


def main(argv=None):
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args(argv)
    rows = arguments.rows
    for name in NETWORKS:
        versions = {"peer": f"kfac-jax {kfac_jax.__version__}", "jax": jax.__version__}
        records = []
        pair = []
        for make, fisher in ((ours, "empirical"), (theirs, "fisher_empirical")):
            run, found, model = make(name, rows, (1, 1), fisher)
            run()
            pair.append(found())
        facts = {"network": name, "parameters": model.count_params(), "rows": rows}
        worst = max(apart(*blocks) for blocks in zip(*pair, strict=True))
        print(f"{name}: factors apart by {worst:.2g}", flush=True)
        claim = {"claim": f"kfac_factors_{name}", **facts, **versions}
        records.append({**claim, "difference": worst, "bar": 1e-4})
        for periods in PERIODS:
            both = [make(name, rows, periods)[0] for make in (ours, theirs)]
            setting = {
                **facts,
                **versions,
                "factor_update_period": periods[0],
                "inverse_update_period": periods[1],
                "period": max(periods),
            }
            claim = f"kfac_step_{name}_{periods[0]}_{periods[1]}"
            records.append(compared(claim, *both, setting, arguments.rounds, 1.0))
        if not arguments.no_record:
            for record in records:
                results.append(RESULTS, {"command": COMMAND, **record})
    return 0


if __name__ == "__main__":
    sys.exit(main())
