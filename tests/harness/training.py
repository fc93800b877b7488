"""Training a small model: eagerly, as a graph, under XLA, stopped and resumed.

On JAX by default under XLA alone, and not stopped (see `brief`).
"""

import keras
import numpy as np

from . import session
from .check import Check
from .traces import count_compilers, count_traces

EAGER = {"run_eagerly": True}
GRAPH = {"jit_compile": False}
XLA = {"jit_compile": True}

# On JAX not compiling is running eagerly.
COMPILED = (GRAPH, XLA) if keras.backend.backend() == "tensorflow" else (XLA,)

# For a step or two: JAX run eagerly compiles every single operation.
QUICK = EAGER if keras.backend.backend() == "tensorflow" else XLA


def brief():
    """Whether to leave to TensorFlow, or to `--all`, what shows on either backend.

    On JAX most of a check's time goes into compilations: an eager step compiles each of
    its operations, another dtype, batch size or model loaded from a file everything.
    """
    return QUICK == XLA and not session.get().full


def set_mode(model, mode):
    """Changes how a compiled model runs."""
    model.run_eagerly = mode.get("run_eagerly", False)
    model.jit_compile = mode.get("jit_compile", False)


def sgd():
    """An optimizer with state whose steps are linear in the gradient."""
    return keras.optimizers.SGD(0.05, momentum=0.9)


def compile_model(model, optimizer, mode):
    """Compiles a model with a mean squared error on each of its outputs."""
    model.compile(optimizer, loss="mse", **mode)
    return attach(model)


def attach(model):
    """Ties a model to its optimizer, if that must know it; returns the model."""
    part = model.optimizer
    while part is not None:
        if hasattr(part, "attach"):
            part.attach(model)
        part = getattr(part, "inner_optimizer", None)
    return model


def train(model, batches):
    """Trains on each batch `(x, y)` or `(x, y, act)`; returns the losses.

    `act(model)` runs before the step, as a callback's would.
    """
    losses = []
    for x, y, *acts in batches:
        for act in acts:
            act(model)
        losses.append(np.asarray(model.train_on_batch(x, y)).ravel()[0])
    return losses


def train_quickly(model, batches):
    """As `train`, a model compiled by `QUICK`; XLA's steps must be traced once."""
    losses = train(model, batches[:1])
    with count_traces() as traced:
        losses += train(model, batches[1:])
    if QUICK == XLA:
        require_one_trace(traced, XLA)
    return losses


def forward(model, x, *modes):
    """A model's outputs, one for each value of `training`, compiled once on JAX."""
    if keras.backend.backend() == "tensorflow":
        return [model(x, training=mode) for mode in modes]
    if not modes:
        return []
    import jax

    @jax.jit
    def run(trainable, other, x):
        outputs = []
        for mode in modes:
            y, other = model.stateless_call(trainable, other, x, training=mode)
            outputs.append(y)
        return outputs, other

    other = model.non_trainable_variables
    outputs, updated = run(
        [v.value for v in model.trainable_variables], [v.value for v in other], x
    )
    for variable, value in zip(other, updated, strict=True):
        variable.assign(value)
    return outputs


def state(model):
    """Everything a training step may read: weights, seeds, optimizer slots."""
    values = [v.numpy() for v in model.variables]
    optimizer = getattr(model, "optimizer", None)
    # A model's variables hold no optimizer's.
    return values + [v.numpy() for v in (optimizer.variables if optimizer else [])]


def check_compiled(make, batches, eager, tol=1e-5, modes=COMPILED):
    """Requires compiled steps to equal eager ones, and to be traced once.

    Args:
        make: A callable, compile arguments -> a fresh compiled model.
        batches: What `train` takes.
        eager: The pair (losses, state) of the same steps run eagerly.
        tol: The tolerance.
        modes: The compile arguments to compare.
    """
    for mode in modes:
        name = named_mode(mode)
        with Check("compiled") as check:
            model = make(mode)
            losses = train(model, batches[:1])
        with count_traces() as traced, Check("compiled") as check:
            losses += train(model, batches[1:])
        with Check("compiled") as check:
            check.close(f"losses with {name} and run eagerly", losses, eager[0], tol)
            check.close(
                f"variables after {len(batches)} steps with {name} and run eagerly",
                state(model),
                eager[1],
                tol,
            )
        require_one_trace(traced, mode)


def require_one_trace(traced, mode):
    """Requires steps after the first to have traced nothing."""
    name = named_mode(mode)
    with Check("retracing") as check:
        check.equal(
            f"the number of functions traced with {name} after the first step",
            len(traced),
            0,
        )


def named_mode(mode):
    """Compile arguments as a user writes them."""
    return " ".join(f"{k}={v}" for k, v in mode.items())


def check_eager(run):
    """Requires what runs eagerly to compile nothing that it has compiled before."""
    with Check("retracing") as check:
        run()
        with count_compilers() as made:
            run()
        check.equal(
            "the number of compiled functions made anew by a second eager run",
            len(made),
            0,
        )


def check_resume(make, batches, folder, stops, mode=EAGER, tol=1e-6):
    """Requires stopping, saving, loading and going on to equal not stopping.

    Args:
        make: A callable, compile arguments -> a fresh compiled model.
        batches: What `train` takes.
        folder: Where to save.
        stops: The numbers of steps after which to stop.
        mode: The compile arguments.
        tol: The tolerance.

    Returns:
        The pair (losses, state) of the run that did not stop.
    """
    with Check("training"):
        model = make(mode)
        losses = train(model, batches[:1])
    with count_traces() as traced, Check("training"):
        files = {}
        for i, batch in enumerate(batches[1:], 1):
            if i in stops:
                files[i] = folder / f"stopped_{i}.keras"
                model.save(files[i])
            losses += train(model, [batch])
        expected = state(model)
    if mode != EAGER:
        require_one_trace(traced, mode)
    for stop, file in files.items():
        with Check("save") as check:
            again = attach(keras.saving.load_model(file))
            set_mode(again, mode)
        with Check("resume") as check:
            rest = train(again, batches[stop:])
            check.close(
                f"losses after resuming from step {stop}", rest, losses[stop:], tol
            )
            check.close(
                f"variables after resuming from step {stop}",
                state(again),
                expected,
                tol,
            )
    return losses, expected


def check_steps(make, batches, stops, tol=1e-5):
    """Requires training to be the same eagerly, compiled, and after stopping.

    By default compiled is by XLA; what it traces is what a graph without it runs, as
    exports and trainings of the zoo do. With `--all`, a graph is compared too. On JAX
    only `--all` does any of this: by default a case for the other backend has XLA's
    steps (see `train_quickly`), and that they give TensorFlow's numbers is shown at the
    session's end.

    Args:
        make: A callable, compile arguments -> a fresh compiled model.
        batches: What `train` takes.
        stops: The numbers of steps after which to stop.
        tol: How close compiled steps must be to eager ones.
    """
    if brief():
        return
    folder = session.get().folder
    eager = check_resume(make, batches, folder, stops)
    modes = COMPILED if session.get().full else (XLA,)
    check_compiled(make, batches, eager, tol, modes)
    model = make(EAGER)
    check_eager(lambda: train(model, batches[:1]))


def check_lowering(model, batch):
    """Requires a compiled model's training step to lower for TPU and CUDA."""
    if keras.backend.backend() != "jax":
        return
    import jax

    with Check("lowering") as check:
        x, y, *_ = batch
        now = [
            [v.value for v in variables]
            for variables in (
                model.trainable_variables,
                model.non_trainable_variables,
                model.optimizer.variables,
                model.metrics_variables,
            )
        ]
        exported = jax.export.export(
            jax.jit(model.train_step), platforms=("tpu", "cuda")
        )(tuple(now), (x, y, None))
        check.equal("the platforms", exported.platforms, ("tpu", "cuda"))


def named_once(check, variables, what):
    """Requires every variable to have a name of its own, given on purpose."""
    paths = [v.path for v in variables]
    check.that(len(set(paths)) == len(paths), f"expected {what} to be unique", paths)
    for variable in variables:
        check.that(
            not variable.name.startswith("variable"),
            f"expected every one of {what} to be named",
            variable.path,
        )
