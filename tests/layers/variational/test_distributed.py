"""Variational layers on two devices, in a process: devices come first in one."""

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
from kzoo.layers import DenseFlipout, DenseReparameterization, SimpleRNNFlipout

strategy = tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"])
x, y = np.ones((32, 5), "float32"), np.zeros((32, 3), "float32")

for kind in (DenseReparameterization, DenseFlipout):
    with strategy.scope():
        layer = kind(3, num_examples=32, seed=1)
        model = keras.Sequential([keras.Input((5,)), layer])
        model.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mse"])

    @tf.function
    def draws():
        return strategy.run(lambda: layer(x[:4]))

    for _ in range(2):
        one, two = (v.numpy() for v in draws().values)
        assert not np.isclose(one, two).any(), (kind, one, two)
        if kind is DenseReparameterization:
            assert np.ptp(one, 0).max() < 1e-6
    # Each replica's part of the loss is halved, the divergence's too.
    logs = model.fit(x, y, batch_size=8, verbose=0).history
    divergence = logs["loss"][0] - logs["mse"][0]
    np.testing.assert_allclose(divergence, float(sum(model.losses)), rtol=1e-4)
# Nor do the halves of a Bidirectional on one replica draw as on another.
with strategy.scope():
    halves = keras.layers.Bidirectional(SimpleRNNFlipout(3, seed=5), merge_mode=None)
    halves(x[:4, None])
    halves.backward_layer.set_weights(halves.forward_layer.get_weights())

@tf.function
def draws():
    return strategy.run(lambda: halves(x[:4, None]))

found = [v.numpy() for pair in draws() for v in pair.values]
for i in range(4):
    for j in range(i):
        assert not np.allclose(found[i], found[j]), (i, j)
print("done")
"""


@pytest.mark.slow
@pytest.mark.tensorflow
def test_replicas_draw_for_themselves_and_count_the_divergence_once():
    ran = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout == "done\n", ran.stdout
