"""DenseBatchEnsemble on two devices, in a process: devices come first in one."""

import subprocess
import sys

import pytest

CODE = """
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)

import keras
import numpy as np
from kzoo.layers import DenseBatchEnsemble

REPLICAS, MEMBERS, ROWS, STEPS, RATE = 2, 2, 3, 4, 0.1
BATCH = REPLICAS * MEMBERS * ROWS
numbers = np.random.default_rng(0)
x = numbers.normal(size=(STEPS * BATCH, 4)).astype("float32")
y = numbers.normal(size=(STEPS * BATCH, 3)).astype("float32")

with tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"]).scope():
    normal = keras.initializers.RandomNormal(1, 0.5)
    layer = DenseBatchEnsemble(
        3, ensemble_size=MEMBERS, alpha_initializer=normal, gamma_initializer=normal
    )
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.SGD(RATE), loss="mse")

# By hand: each member's own kernel, and every row's member written out.
names = ("alpha", "gamma", "kernel", "bias")
values = {name: tf.constant(getattr(layer, name).numpy()) for name in names}
member = np.tile(np.repeat(np.eye(MEMBERS, dtype="float32"), ROWS, 0), (REPLICAS, 1))
for step in range(STEPS):
    rows = slice(step * BATCH, (step + 1) * BATCH)
    with tf.GradientTape() as tape:
        tape.watch(values)
        kernels = values["kernel"] * tf.einsum(
            "mi,mo->mio", values["alpha"], values["gamma"]
        )
        outputs = tf.einsum("nm,ni,mio->no", member, x[rows], kernels)
        outputs += member @ values["bias"]
        loss = tf.reduce_mean((outputs - y[rows]) ** 2)
    gradients = tape.gradient(loss, values)
    values = {name: values[name] - RATE * gradients[name] for name in names}

model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
for name in names:
    np.testing.assert_allclose(
        getattr(layer, name).numpy(), values[name], rtol=1e-5, atol=1e-6, err_msg=name
    )

# M divides the batch, but no replica's part of it.
try:
    model.fit(x[:6], y[:6], batch_size=6, verbose=0)
except tf.errors.InvalidArgumentError as error:
    assert "divisible by ensemble_size=2" in str(error), error
    print("done")
"""


@pytest.mark.slow
@pytest.mark.tensorflow
def test_each_replica_splits_its_own_rows():
    ran = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout == "done\n", ran.stdout
