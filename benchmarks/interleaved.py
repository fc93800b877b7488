"""Steps, and two of them timed turn by turn, so that what slows one slows both."""

import time

import keras
import numpy as np


def jax_step(model, batch):
    """A compiled training step of a compiled Keras model on JAX, as `fit` runs it.

    Returns:
        A function that runs one step and waits for it; a list with the state after the
        last one, as Keras's `train_step` has it; and what the compiler made.
    """
    import jax
    import jax.numpy as jnp

    model.optimizer.build(model.trainable_variables)
    kinds = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    # Copies, as each step may write its results where its arguments were.
    held = [tuple([jnp.array(v.value) for v in variables] for variables in kinds)]
    step = jax.jit(model.train_step, donate_argnums=0).lower(held[0], batch).compile()

    def run():
        logs, held[0] = step(held[0], batch)
        return jax.block_until_ready(logs)

    return run, held, step


def seconds(step, steps):
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def measure(method, peer, rounds, period=6):
    """Returns each round's seconds a step, [rounds, 2]: of the method, of its peer."""
    for step in (method, peer):
        seconds(step, 2)  # compile and warm up
    # Blocks of about a quarter of a second, so that the clock and the scheduler are
    # small beside them, and a multiple of the period (6 is Lookahead's); of steps that
    # take more than a second, single ones.
    steps = {}
    for step in (method, peer):
        steps[step] = 1
        if seconds(step, 1) < 1:
            blocks = round(0.25 / seconds(step, 6) / period)
            steps[step] = period * max(1, blocks)
    times = []
    for i in range(rounds):
        turns = (method, peer) if i % 2 == 0 else (peer, method)
        pair = [seconds(step, steps[step]) for step in turns]
        times.append(pair if i % 2 == 0 else pair[::-1])
    return np.array(times), list(steps.values())


def compared(claim, method, peer, setting, rounds, bar=None):
    """Measures a claim, prints a line on it, and returns its record.

    Args:
        claim: Its name.
        method: A function that runs a step.
        peer: Another one.
        setting: Dict of what else the record has; of `period`, if steps differ with
            one, and `tokens`, if a step has some.
        rounds: How many rounds, of which the median counts.
        bar: The largest ratio, or None.
    """
    times, steps = measure(method, peer, rounds, setting.get("period", 6))
    low, ratio, high = np.percentile(times[:, 0] / times[:, 1], [25, 50, 75])
    record = {
        "claim": claim,
        "backend": keras.backend.backend(),
        "dtype": keras.config.dtype_policy().name,
        "jit_compile": True,
        **setting,
        "rounds": rounds,
        "steps_per_round": steps,
        "milliseconds": round(1e3 * float(np.median(times[:, 0])), 4),
        "peer_milliseconds": round(1e3 * float(np.median(times[:, 1])), 4),
        "ratio": round(float(ratio), 4),
        "ratio_quartiles": [round(float(low), 4), round(float(high), 4)],
        "bar": bar,
    }
    told = (
        f"{claim:34s} {record['milliseconds']:9.3f} ms  peer "
        f"{record['peer_milliseconds']:9.3f} ms  ratio {ratio:.3f} "
        f"[{low:.3f}, {high:.3f}]"
    )
    if bar:
        told += f"  bar {bar}  {'met' if ratio <= bar else 'MISSED'}"
    if "tokens" in setting:
        per_second = 1e3 * setting["tokens"] / record["milliseconds"]
        record["tokens_per_second"] = round(per_second)
        told += f"  {per_second:.0f} tokens/s"
    print(told, flush=True)
    return record
