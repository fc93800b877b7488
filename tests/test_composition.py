"""What the zoo offers, together: optimizers, ensembles, precision, compilation."""

import itertools

import keras
import numpy as np
import pytest

from harness.check import Check
from harness.fresh import record_export
from kzoo.layers import (
    AverageMembers,
    Conv2DBatchEnsemble,
    Conv2DFlipout,
    DenseBatchEnsemble,
    DenseFlipout,
    LSTMFlipout,
    TileMembers,
    batch_ensemble_initializer,
)
from kzoo.optimizers import Lookahead

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.01),
    "lion": lambda: keras.optimizers.Lion(0.003),
    "nadam": lambda: keras.optimizers.Nadam(0.01, clipnorm=1.0),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "adamax": lambda: keras.optimizers.Adamax(0.01, gradient_accumulation_steps=2),
    "adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
    "adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "ftrl": lambda: keras.optimizers.Ftrl(0.1),
    "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True),
}
INNER_STATES = ("maintain", "reset", "pullback")
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")
MODELS = ("dense", "conv", "flipout", "lstm")
JIT = (True, False)
MEMBERS = 2


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    if metafunc.config.option.all:
        cases = list(itertools.product(OPTIMIZERS, INNER_STATES, POLICIES, MODELS, JIT))
    else:
        # Every optimizer once; every pair of inner states and policies somewhere. XLA
        # on TensorFlow compiles slowly, so each model once; JAX without it every
        # operation.
        others = list(itertools.product(INNER_STATES, POLICIES))
        on_jax = keras.backend.backend() == "jax"
        cases = [
            (name, *others[i % len(others)], MODELS[i % 4], on_jax or i in (0, 2, 5, 7))
            for i, name in enumerate(OPTIMIZERS)
        ]
    parameters = [
        pytest.param(
            case,
            id="-".join(map(str, case)),
            # On JAX a second fit fails in Keras: the average of the weights that the
            # first one put in their place was donated with them.
            marks=pytest.mark.tensorflow if case[0] == "ema" else (),
        )
        for case in cases
    ]
    metafunc.parametrize("case", parameters)


def ensemble(kind, policy):
    """A small BatchEnsemble classifier of inputs of shape `[4, 4, 2]`."""

    method = {
        "ensemble_size": MEMBERS,
        "alpha_initializer": batch_ensemble_initializer(-0.5),
        "gamma_initializer": batch_ensemble_initializer(-0.5),
        "dtype": policy,
    }
    image = keras.Input((4, 4, 2), name="image")
    x = TileMembers(MEMBERS, dtype=policy)(image)
    options = {"dtype": policy, "num_examples": 24, "seed": 1}
    if kind == "flipout":
        x = Conv2DFlipout(4, 3, activation="relu", **options)(x)
    if kind == "conv":
        x = Conv2DBatchEnsemble(4, 3, activation="relu", **method)(x)
        x = keras.layers.GlobalAveragePooling2D(dtype=policy)(x)
    elif kind == "lstm":
        x = keras.layers.Reshape((4, 8), dtype=policy)(x)
        x = LSTMFlipout(4, recurrent_dropout=0.1, **options)(x)
    else:
        x = keras.layers.Flatten(dtype=policy)(x)
        if kind == "flipout":
            x = DenseFlipout(8, activation="relu", **options)(x)
        x = DenseBatchEnsemble(8, activation="relu", **method)(x)
    x = DenseBatchEnsemble(3, **method)(x)
    return keras.Model(image, AverageMembers(MEMBERS, dtype=policy)(x), name="ensemble")


def lookahead(model):
    """A model's Lookahead, around which Keras scales the loss in float16."""
    optimizer = model.optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


def data():
    """Images, and whether they are bright."""
    x = np.random.default_rng(0).normal(size=(24, 4, 4, 2)).astype("float32")
    return x, (x.mean(axis=(1, 2, 3)) > 0).astype("int32")


def fit(model, x, y, epochs):
    history = model.fit(
        x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0
    ).history
    return history["loss"]


@pytest.mark.slow
def test_fits_reloads_and_exports(case, tmp_path):
    name, inner_state, policy, kind, jit = case
    x, y = data()
    model = ensemble(kind, policy)
    model.compile(
        Lookahead(OPTIMIZERS[name](), sync_period=4, inner_state=inner_state),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit,
    )
    if not jit:  # XLA's steps make the slots inside, for which they are traced twice.
        model.optimizer.build(model.trainable_variables)
    losses = fit(model, x, y, 4)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]

    # Twelve steps end a cycle; one more epoch stops in the middle of one.
    fit(model, x, y, 1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    with Check("resume") as check:
        check.close("losses", fit(loaded, x, y, 1), fit(model, x, y, 1), 1e-6)
        check.close("weights", loaded.weights, model.weights, 1e-6)

    fast = model.get_weights()
    with lookahead(model).slow_weights():
        slow = model.get_weights()
        assert any((a != b).any() for a, b in zip(slow, fast, strict=True))
        record_export(f"{name}_{kind}_{policy}", model, [x[:1], x[:3]])
    with Check("slow weights") as check:
        check.close("weights after the context", model.get_weights(), fast, 0)
