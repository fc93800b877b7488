"""Lookahead on two devices. Each test is a process, as devices come first in one."""

import os
import subprocess
import sys
import textwrap

import pytest

# Trains on one device and on two, with the callback that evaluates slow weights.
COMMON = """
    import keras
    import numpy as np
    from keras.optimizers import SGD, Adam, LossScaleOptimizer

    from kzoo.optimizers import Lookahead, SwapSlowWeights

    numbers = np.random.default_rng(0)
    x = numbers.normal(size=(64, 4)).astype("float32")
    y = numbers.normal(size=(64, 2)).astype("float32")
    CASES = {
        "maintain": lambda: Lookahead(Adam(0.05), 3),
        "pullback, loss scale below": lambda: Lookahead(
            LossScaleOptimizer(SGD(0.05, momentum=0.9)), 3, inner_state="pullback"
        ),
        "reset, loss scale above": lambda: LossScaleOptimizer(
            Lookahead(Adam(0.05), 3, inner_state="reset")
        ),
        "resets in resets": lambda: Lookahead(
            Lookahead(Adam(0.05), 2, inner_state="reset"), 5, inner_state="reset"
        ),
    }

    def compiled(make, **kwargs):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(4, "tanh"), keras.layers.Dense(2)]
        model = keras.Sequential([keras.Input((4,)), *layers])
        model.compile(make(), loss="mse", **kwargs)
        return model

    def fit(model):
        history = model.fit(
            x, y, batch_size=8, epochs=1, shuffle=False, verbose=0,
            validation_data=(x, y), callbacks=[SwapSlowWeights()],
        )
        state = [*model.weights, *model.optimizer.variables]
        values = [keras.ops.convert_to_numpy(v) for v in state]
        return [*values, np.array(history.history["val_loss"])]

    def check(name, one, two):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
"""


def run_process(before, after, **env):
    """Runs Python code in a process of its own and requires it to end well."""
    code = "\n".join(textwrap.dedent(part) for part in (before, COMMON, after))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.endswith("done\n"), ran.stdout


@pytest.mark.slow
@pytest.mark.tensorflow
def test_mirrored_strategy():
    run_process(
        """
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
        """,
        """
        for name, make in CASES.items():
            strategy = tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"])
            with strategy.scope():
                model = compiled(make)
            check(name, fit(model), fit(compiled(make, run_eagerly=True)))
            for variable in [*model.weights, *model.optimizer.variables]:
                first, *others = strategy.experimental_local_results(variable.value)
                for other in others:
                    np.testing.assert_array_equal(first.numpy(), other.numpy(), name)

        # A training loop of one's own: the mean loss is each replica's half.
        with strategy.scope():
            model = compiled(CASES["resets in resets"])
            model.optimizer.build(model.trainable_variables)

        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x) - y) ** 2) / 2
            variables = model.trainable_variables
            gradients = tape.gradient(loss, variables)
            model.optimizer.apply_gradients(zip(gradients, variables))

        single = compiled(CASES["resets in resets"])
        distributed = tf.function(lambda: strategy.run(step))
        for _ in range(7):
            distributed()
            single.train_on_batch(x, y)
        check("loop", model.get_weights(), single.get_weights())
        print("done")
        """,
    )


@pytest.mark.slow
@pytest.mark.jax
def test_keras_distribution():
    run_process(
        "",
        """
        devices = keras.distribution.list_devices()
        assert len(devices) == 2
        mesh = keras.distribution.DeviceMesh((1, 2), ["batch", "model"], devices)
        layout = keras.distribution.LayoutMap(mesh)
        layout[".*kernel.*"] = (None, "model")
        distributions = [
            keras.distribution.DataParallel(devices=devices),
            keras.distribution.ModelParallel(
                layout_map=layout, batch_dim_name="batch"
            ),
        ]
        for name, make in CASES.items():
            one = fit(compiled(make))
            for distribution in distributions:
                with distribution.scope():
                    model = compiled(make)
                    check(name, fit(model), one)
                for variable in [*model.weights, *model.optimizer.variables]:
                    assert len(variable.value.sharding.device_set) == 2, variable.path
        print("done")
        """,
        XLA_FLAGS=os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=2",
    )
