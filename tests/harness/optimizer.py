"""The contract of an optimizer."""

import json

import keras
import numpy as np

from . import session
from .check import Check, differ
from .configs import check_config, check_registration
from .docs import check_docstring
from .fresh import record_case
from .training import (
    COMPILED,
    EAGER,
    QUICK,
    XLA,
    attach,
    check_compiled,
    check_eager,
    check_lowering,
    check_resume,
    compile_model,
    named_once,
    train,
)

STEPS = 7
# Stops in the middle of every cycle of up to seven steps.
STOPS = (1, 2, 3, 5)


@session.noted
def check_optimizer(make):
    """Checks an optimizer against every generic point of the contract.

    Args:
        make: A callable without arguments that returns a fresh optimizer; arguments
            that are not the defaults test more. Periods should be short: a run here
            has seven steps.
    """
    with Check("config"):
        instance = make()
    check_registration(type(instance))
    check_docstring(type(instance), "optimizer")
    check_config(instance, None, None)
    check_build(make)
    check_training(make)
    check_learning_rate(make)
    check_clipping(make)
    check_accumulation(make)
    check_loss_scale(make)
    leave_for_fresh_processes(make)


def new_model(dtype=None):
    """A small model whose first weights are always the same."""

    def dense(units, activation, name):
        init = keras.initializers.GlorotUniform(seed=units)
        return keras.layers.Dense(
            units, activation, kernel_initializer=init, dtype=dtype, name=name
        )

    x = keras.Input((3,), name="x")
    y = dense(2, None, "second")(dense(4, "tanh", "first")(x))
    return keras.Model(x, y)


def batches(count=STEPS, acts=None):
    """Training batches; `acts` maps a step to what runs before it."""
    found = []
    for i in range(count):
        numbers = np.random.default_rng(i)
        x = numbers.normal(size=(5, 3)).astype("float32")
        y = numbers.normal(size=(5, 2)).astype("float32")
        found.append((x, y, *((acts[i],) if acts and i in acts else ())))
    return found


def maker(make, dtype=None):
    """A callable that makes a compiled model, from its compile arguments."""
    return lambda mode: compile_model(new_model(dtype), make(), mode)


def with_option(optimizer, name, value):
    """The same optimizer with one argument of its innermost optimizer changed."""
    config = keras.optimizers.serialize(optimizer)
    config = json.loads(json.dumps(config))
    inner = innermost(config, name)
    if inner is None:
        raise ValueError(
            f"expected the config to hold {name!r}; Received {json.dumps(config)}"
        )
    inner[name] = value
    return keras.optimizers.deserialize(config)


def innermost(config, name):
    """The deepest dict of a config that has the key, or None."""
    for value in config.values() if isinstance(config, dict) else ():
        found = innermost(value, name)
        if found is not None:
            return found
    return config if isinstance(config, dict) and name in config else None


def apply(optimizer, gradients, before=lambda step: None):
    """Applies pairs of gradients to two fixed variables; returns their values.

    `before(step)` is called before each.
    """
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.set_weights([np.array([[1.0, -2.0], [0.5, 3.0]]), np.array([0.1, -0.4])])
    model.optimizer = optimizer
    variables = attach(model).trainable_variables
    optimizer.build(variables)
    for step, pair in enumerate(gradients):
        before(step)
        pair = [keras.ops.convert_to_tensor(g) for g in pair]
        if keras.backend.backend() == "tensorflow":
            optimizer.apply(pair)
            continue
        # The way Keras applies gradients on JAX.
        state = [*variables, *optimizer.variables]
        weights, slots = optimizer.stateless_apply(
            [v.value for v in optimizer.variables], pair, [v.value for v in variables]
        )
        for variable, value in zip(state, [*weights, *slots], strict=True):
            variable.assign(value)
    return [v.numpy() for v in variables]


def gradients(count=3):
    """Pairs of gradients, some larger than what the clipping checks allow."""
    numbers = np.random.default_rng(3)
    return [
        [
            numbers.normal(size=(2, 2)).astype("float32"),
            numbers.normal(size=(2,)).astype("float32"),
        ]
        for _ in range(count)
    ]


def is_settable(optimizer):
    """Whether the learning rate is a number rather than a schedule."""
    try:
        optimizer.learning_rate = float(optimizer.learning_rate)
    except TypeError:  # Keras's answer when a schedule is in its place.
        return False
    return True


def check_build(make):
    """State is made once, one named variable each, and all of it is known."""
    with Check("build") as check:
        optimizer, model = make(), new_model()
        optimizer.build(model.trainable_variables)
        paths = [v.path for v in optimizer.variables]
        named_once(check, optimizer.variables, "optimizer variables")
        check_float32(check, optimizer, "float32")
        optimizer.build(model.trainable_variables)
        check.equal(
            "the variables after a second build",
            [v.path for v in optimizer.variables],
            paths,
        )
        apply(make(), gradients())


def check_float32(check, optimizer, policy):
    """Requires an optimizer's state to be in float32."""
    for v in optimizer.variables:
        check.that(
            "float" not in v.dtype or v.dtype == "float32",
            f"expected float32 optimizer variables under {policy}",
            f"{v.path} of {v.dtype}",
        )


def check_training(make):
    """Training is the same eagerly, compiled, and after stopping; it lowers."""
    acts = {}
    with Check("learning rate"):
        if is_settable(make()):

            def halve(model):
                optimizer = model.optimizer
                optimizer.learning_rate = float(optimizer.learning_rate) / 2

            acts = {4: halve}
    folder, data = session.get().folder, batches(acts=acts)
    check_save(make)
    stops = range(1, STEPS) if session.get().full else STOPS
    eager = check_resume(maker(make), data, folder, stops)
    check_compiled(maker(make), data, eager)
    model = maker(make)(EAGER)
    check_eager(lambda: train(model, data[:1]))
    with Check("lowering"):
        model = maker(make)(XLA)
        model.optimizer.build(model.trainable_variables)
    check_lowering(model, data[0])


def check_save(make):
    """A saved model's optimizer comes back with all of its state."""
    with Check("save") as check:
        model = maker(make)(EAGER)
        train(model, batches(2))
        file = session.get().folder / "optimizer.keras"
        model.save(file)
        loaded = keras.saving.load_model(file)
        check.that(
            type(loaded.optimizer) is type(model.optimizer),
            f"expected the loaded optimizer to be a {type(model.optimizer).__name__}",
            type(loaded.optimizer).__name__,
        )
        check.equal(
            "names of optimizer variables after loading",
            [v.path for v in loaded.optimizer.variables],
            [v.path for v in model.optimizer.variables],
        )
        check.close(
            "optimizer variables after loading",
            loaded.optimizer.variables,
            model.optimizer.variables,
            0,
        )


def check_learning_rate(make):
    """The learning rate can be read, assigned and scheduled."""
    with Check("learning rate") as check:
        optimizer = make()
        if is_settable(optimizer):
            optimizer.learning_rate = 0.125
            check.equal(
                "the learning rate after assignment",
                float(optimizer.learning_rate),
                0.125,
            )
            check.that(
                differ(apply(optimizer, gradients(1)), apply(make(), gradients(1))),
                "expected another learning rate to give other variables",
                "the same variables",
            )
    with Check("schedule") as check:
        schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
        config = keras.optimizers.schedules.serialize(schedule)
        scheduled = with_option(make(), "learning_rate", config)
        assigned = with_option(make(), "learning_rate", 0.1)
        pairs = gradients()
        found = apply(scheduled, pairs)
        check.close(
            f"the learning rate after {len(pairs)} scheduled steps",
            scheduled.learning_rate,
            schedule(len(pairs)),
            1e-6,
        )

        def assign(step):
            assigned.learning_rate = float(schedule(step))

        check.close(
            "variables with a schedule and with its values assigned",
            found,
            apply(assigned, pairs, assign),
            1e-6,
        )


def check_clipping(make):
    """Clipping by an argument equals applying gradients clipped beforehand."""

    def norm(*arrays):
        return np.sqrt(sum(np.sum(a.astype("float64") ** 2) for a in arrays))

    def by_global_norm(pair):
        return [(g * min(1, 0.5 / norm(*pair))).astype("float32") for g in pair]

    clips = {
        "clipvalue": (0.3, lambda pair: [np.clip(g, -0.3, 0.3) for g in pair]),
        "clipnorm": (
            0.5,
            lambda pair: [(g * min(1, 0.5 / norm(g))).astype("float32") for g in pair],
        ),
        "global_clipnorm": (0.5, by_global_norm),
    }
    with Check("clipping") as check:
        for name, (value, clip) in clips.items():
            check.close(
                f"variables with {name}={value} and with gradients clipped beforehand",
                apply(with_option(make(), name, value), gradients()),
                apply(make(), [clip(pair) for pair in gradients()]),
                1e-5,
            )


def check_accumulation(make):
    """Accumulating a gradient with itself equals applying it once."""
    with Check("gradient accumulation") as check:

        def accumulating():
            return with_option(make(), "gradient_accumulation_steps", 2)

        start, pairs = apply(make(), []), gradients()
        check.close(
            "variables after half of the accumulation steps",
            apply(accumulating(), pairs[:1]),
            start,
            0,
        )
        check.close(
            "variables after accumulating every gradient with itself",
            apply(accumulating(), [pair for pair in pairs for _ in range(2)]),
            apply(make(), pairs),
            1e-6,
        )
    folder, full = session.get().folder, session.get().full
    mode = EAGER if full else QUICK
    found = check_resume(maker(accumulating), batches(), folder, (3,), mode)
    if mode == EAGER:
        modes = COMPILED if full else (XLA,)
        check_compiled(maker(accumulating), batches(), found, modes=modes)


def check_loss_scale(make):
    """Under LossScaleOptimizer steps are the same, or not taken at all."""

    def scaled():
        return keras.optimizers.LossScaleOptimizer(make(), initial_scale=16.0)

    with Check("mixed precision") as check:
        pairs = gradients()
        check.close(
            "variables with and without a loss scale",
            apply(scaled(), [[g * np.float32(16) for g in pair] for pair in pairs]),
            apply(make(), pairs),
            1e-6,
        )
        infinite = [[g * np.float32(np.inf) for g in gradients(1)[0]]]
        optimizer = scaled()
        received = apply(optimizer, infinite)
        check.close(
            "variables after infinite gradients", received, apply(make(), []), 0
        )
        check.equal(
            "the optimizer's iterations after infinite gradients",
            int(optimizer.inner_optimizer.iterations),
            0,
        )
    folder, full = session.get().folder, session.get().full
    policies = ["mixed_float16"]
    if full or keras.backend.backend() == "tensorflow":  # Compiling on JAX is slow.
        policies.append("mixed_bfloat16")
    for policy in policies:
        for mode in (EAGER, XLA) if full else (QUICK,):
            make_mixed = maker(scaled, policy)
            losses, values = check_resume(make_mixed, batches(), folder, (2,), mode)
            with Check("mixed precision") as check:
                check.finite(f"losses under {policy}", losses)
                check.finite(f"variables under {policy}", values)
                first = new_model(policy).get_weights()
                check.that(
                    all(differ(a, b) for a, b in zip(values, first, strict=False)),
                    f"expected all weights to change under {policy}",
                    "a weight's first values",
                )
        with Check("mixed precision") as check:
            model = new_model(policy)
            optimizer = make()
            optimizer.build(model.trainable_variables)
            check_float32(check, optimizer, policy)


def leave_for_fresh_processes(make):
    """Leaves a model in the middle of training for the other backend."""
    with Check("other backend"):
        data = batches()
        model = maker(make)(QUICK)
        train(model, data[:2])

        def steps():
            return data[2:], train(model, data[2:])

        record_case(
            type(make()).__name__,
            model,
            [type(model.optimizer)],
            steps=steps,
            tol=1e-4,
        )
