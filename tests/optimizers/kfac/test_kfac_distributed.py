"""KFAC on two devices. Each test is a process, as devices come first in one."""

import os
import subprocess
import sys
import textwrap

import pytest

COMMON = """
    import keras
    import numpy as np

    from kzoo.optimizers import KFAC

    numbers = np.random.default_rng(0)
    x = numbers.normal(size=(64, 4)).astype("float32")
    y = numbers.normal(size=(64, 2)).astype("float32")

    def trained(loss="mse"):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(4, "tanh"), keras.layers.Dense(2)]
        model = keras.Sequential([keras.Input((4,)), *layers])
        optimizer = KFAC(
            model, 0.1, norm_constraint=1e-2, factor_update_period=2,
            inverse_update_period=3, fisher="exact", seed=0,
        )
        model.compile(optimizer, loss=loss)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        state = [*model.weights, *optimizer.variables]
        return [keras.ops.convert_to_numpy(v) for v in state]

    def check(one, two):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
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
        for loss in ("mse", keras.losses.MeanSquaredError(reduction="sum")):
            with tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"]).scope():
                two = trained(loss)
            check(two, trained(loss))
        print("done")
        """,
    )


@pytest.mark.slow
@pytest.mark.jax
def test_keras_distribution():
    run_process(
        "",
        """
        one = trained()
        devices = keras.distribution.list_devices()
        assert len(devices) == 2
        with keras.distribution.DataParallel(devices=devices).scope():
            check(trained(), one)
        print("done")
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
