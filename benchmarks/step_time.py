"""Whole jitted train steps against their plain Keras peers, in interleaved pairs.

    python benchmarks/step_time.py [PATTERN] [--rounds 30] [--no-record]

Each claim builds the method and its peer with the same rows, the same data and
the same optimizer, compiles both train steps with XLA, and then times them turn
by turn in one process: round i runs a block of steps of one, then of the other,
in alternating order, and gives one ratio. The median ratio and its quartiles are
printed and appended to benchmarks/results/step_time.jsonl, beside the bar.
"""

import argparse
import fnmatch
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from interleaved import compared, seconds

from kzoo import zoo
from kzoo.layers import (
    BatchNormalizationBatchEnsemble,
    Conv2DBatchEnsemble,
    Conv2DFlipout,
    DenseBatchEnsemble,
    DenseFlipout,
    PosteriorSamples,
    RevGRU,
)
from kzoo.optimizers import KFAC, Lookahead
from kzoo.zoo import results

RESULTS = Path(__file__).parent / "results" / "step_time.jsonl"


def train_step(model, optimizer, x, y, jit=True, loss="mse"):
    """Returns a function that runs one compiled train step and waits for its loss."""
    model.compile(optimizer=optimizer, loss=loss, jit_compile=jit)
    model.optimizer.build(model.trainable_variables)
    x, y = tf.constant(x), tf.constant(y)
    step = tf.function(lambda: model.train_step((x, y))["loss"], jit_compile=jit)
    return lambda: step().numpy()


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def lookahead_adam():
    """Lookahead(Adam) against Adam: an MLP of 1 M parameters, batch 32."""

    def mlp():
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.Input((256,)),
                keras.layers.Dense(752, activation="relu"),
                keras.layers.Dense(752, activation="relu"),
                keras.layers.Dense(256),
            ]
        )

    x, y = normal(32, 256), normal(32, 256)
    method, peer = mlp(), mlp()
    return (
        train_step(method, Lookahead(keras.optimizers.Adam()), x, y),
        train_step(peer, keras.optimizers.Adam(), x, y),
        {"parameters": peer.count_params(), "batch": 32, "peer": "Adam"},
    )


def layer_pair(layer, plain, first, x, y):
    """Models of a layer and its peer, behind the layer `first` unless it is None.

    A model's first layer needs no gradient of its input. BatchEnsemble computes it
    all the same, since the gradient of r is made of it, so as a first layer it does
    more work than its peer; behind a trainable layer, where layers usually stand,
    both compute it.
    """

    def model(one):
        keras.utils.set_random_seed(0)
        before = [] if first is None else [first()]
        return keras.Sequential([keras.Input(x.shape[1:]), *before, one])

    return (
        train_step(model(layer), keras.optimizers.SGD(0.01), x, y),
        train_step(model(plain), keras.optimizers.SGD(0.01), x, y),
    )


def dense_batch_ensemble(first=False):
    """DenseBatchEnsemble(1024 -> 1024, 4 members) against Dense, 128 rows each."""
    pair = layer_pair(
        DenseBatchEnsemble(1024, ensemble_size=4),
        keras.layers.Dense(1024),
        None if first else lambda: keras.layers.Dense(1024),
        normal(128, 1024 if first else 8),
        normal(128, 1024),
    )
    return *pair, {"shape": "1024->1024", "rows": 128, "peer": "keras Dense"}


def conv2d_batch_ensemble(first=False):
    """Conv2DBatchEnsemble(64 -> 64, 3x3, 32x32, 4 members) against Conv2D, 16 rows."""
    pair = layer_pair(
        Conv2DBatchEnsemble(64, 3, padding="same", ensemble_size=4),
        keras.layers.Conv2D(64, 3, padding="same"),
        None if first else lambda: keras.layers.Conv2D(64, 1),
        normal(16, 32, 32, 64 if first else 1),
        normal(16, 32, 32, 64),
    )
    return *pair, {"shape": "64->64, 3x3, 32x32", "rows": 16, "peer": "keras Conv2D"}


def dense_batch_ensemble_edward2():
    """DenseBatchEnsemble(1024 -> 1024, 4 members) against edward2's on Keras 3."""
    peer = edward2().layers.DenseBatchEnsemble(1024, ensemble_size=4)
    pair = layer_pair(
        DenseBatchEnsemble(1024, ensemble_size=4),
        peer,
        lambda: keras.layers.Dense(1024),
        normal(128, 8),
        normal(128, 1024),
    )
    return *pair, {"shape": "1024->1024", "rows": 128, "peer": "edward2"}


def edward2():
    """edward2, from `.peers` (pip install --no-deps --target .peers edward2)."""
    import scipy.stats

    # It wraps the method `rvs` of all of SciPy's distributions; one has none any more.
    scipy.stats._multivariate.dirichlet_multinomial_gen.rvs = None
    sys.path.append(str(Path(__file__).parent.parent / ".peers"))
    import edward2

    return edward2


def wide_block(conv, norm, width=160):
    """A block of a wide residual network, of WRN-28-10's first stage."""

    def block(x):
        y = x
        for _ in range(2):
            y = keras.layers.ReLU()(norm()(y))
            y = conv(width, 3, padding="same", use_bias=False)(y)
        return x + y

    return block


def ensemble_networks(kind, members):
    """A BatchEnsemble of M members, and M separate models as one, of the same inputs.

    `dense`: 4096 -> 4096. `wide_block`: a block of WRN-28-10 at 32x32.

    Returns:
        The two models, and the shape of an input. The second takes `[B, M, *shape]`.
    """
    shape = (4096,) if kind == "dense" else (32, 32, 160)

    def network(ensemble):
        keras.utils.set_random_seed(0)
        x = keras.Input(shape)
        if kind == "dense":
            make = DenseBatchEnsemble if ensemble else keras.layers.Dense
            own = {"ensemble_size": members} if ensemble else {}
            return keras.Model(x, make(4096, **own)(x))
        if not ensemble:
            conv, norm = keras.layers.Conv2D, keras.layers.BatchNormalization
            return keras.Model(x, wide_block(conv, norm)(x))
        own = {"ensemble_size": members}
        conv = partial(Conv2DBatchEnsemble, **own)
        norm = partial(BatchNormalizationBatchEnsemble, **own)
        return keras.Model(x, wide_block(conv, norm)(x))

    together, apart = network(True), [network(False) for _ in range(members)]
    of_all = keras.Input((members, *shape))
    outputs = [one(of_all[:, m]) for m, one in enumerate(apart)]
    return together, keras.Model(of_all, keras.ops.stack(outputs, axis=1)), shape


def separate(kind, members, train=False):
    """A BatchEnsemble of M members against M separate models in one compiled call.

    Each member has rows of its own, as many as each separate model: of `dense` one,
    where reading the weights rules, of `wide_block` 8, where computing does.
    """
    together, stacked, shape = ensemble_networks(kind, members)
    rows = 1 if kind == "dense" else 8
    facts = {"members": members, "rows": rows * members, "train": train}
    facts["shape"] = "x".join(map(str, shape))
    x, y = normal(rows * members, *shape), normal(rows * members, *shape)
    facts["parameters"] = together.count_params()
    facts["parameters_of_peer"] = stacked.count_params()
    facts["peer"] = f"{members} Keras models in one call"

    def split(array):
        return np.moveaxis(array.reshape(members, rows, *shape), 0, 1)

    if train:
        method = train_step(together, keras.optimizers.SGD(0.01), x, y)
        peer = train_step(stacked, keras.optimizers.SGD(0.01), split(x), split(y))
        return method, peer, facts
    pair = []
    for model, inputs in ((together, x), (stacked, split(x))):
        inputs = tf.constant(inputs)
        call = tf.function(
            lambda m=model, i=inputs: m(i, training=False), jit_compile=True
        )
        pair.append(lambda call=call: call().numpy())
    return *pair, facts


def members_at_fixed_rows(members):
    """A train step of M members against one member's, with the same rows in all."""
    x, y = normal(128, 8), normal(128, 1024)

    def model(size):
        keras.utils.set_random_seed(0)
        last = DenseBatchEnsemble(1024, ensemble_size=size)
        return keras.Sequential([keras.Input((8,)), keras.layers.Dense(1024), last])

    method, peer = (
        train_step(model(size), keras.optimizers.SGD(0.01), x, y)
        for size in (members, 1)
    )
    facts = {"shape": "1024->1024", "rows": 128, "members": members}
    return method, peer, {**facts, "peer": "one member"}


def against_tfp(make, name, arguments, x, y):
    """Train steps of a layer and of TensorFlow Probability's, and what they were.

    Each with or without XLA, whichever is faster for it.
    """
    import tensorflow_probability
    import tf_keras

    def ours(jit):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input(x.shape[1:]), make()])
        return train_step(model, keras.optimizers.SGD(0.01), x, y, jit)

    def theirs(jit):
        layer = getattr(tensorflow_probability.layers, name)(*arguments)
        model = tf_keras.Sequential([tf_keras.Input(x.shape[1:]), layer])
        model.compile(tf_keras.optimizers.SGD(0.01), "mse")
        batch = tf.constant(x), tf.constant(y)
        step = tf.function(lambda: model.train_step(batch)["loss"], jit_compile=jit)
        return lambda: step().numpy()

    pair = []
    for build in (ours, theirs):
        steps = {jit: build(jit) for jit in (False, True)}
        for step in steps.values():
            seconds(step, 5)  # compile and warm up
        jit = min(steps, key=lambda jit: seconds(steps[jit], 10))
        pair.append((steps[jit], jit))
    (method, jit), (peer, peer_jit) = pair
    facts = {"jit_compile": jit, "peer": f"tfp.layers.{name}"}
    return method, peer, {**facts, "peer_jit_compile": peer_jit, "rows": len(x)}


def dense_flipout(batch=1024, tfp=False):
    """DenseFlipout(1024 -> 1024) against Dense, or against tfp.layers'."""
    x, y = normal(batch, 1024), normal(batch, 1024)
    facts = {"shape": "1024->1024", "rows": batch, "peer": "keras Dense"}

    def make():
        return DenseFlipout(1024, num_examples=60000)

    if tfp:
        method, peer, found = against_tfp(make, "DenseFlipout", [1024], x, y)
        return method, peer, {**facts, **found}
    return *layer_pair(make(), keras.layers.Dense(1024), None, x, y), facts


def conv2d_flipout(batch=32, tfp=False):
    """Conv2DFlipout(64 -> 64, 3x3, 32x32) against Conv2D, or against tfp.layers'."""
    x, y = normal(batch, 32, 32, 64), normal(batch, 32, 32, 64)
    facts = {"shape": "64->64, 3x3, 32x32", "rows": batch, "peer": "keras Conv2D"}
    arguments = [64, 3, 1, "same"]

    def make():
        return Conv2DFlipout(*arguments, num_examples=60000)

    if tfp:
        method, peer, found = against_tfp(make, "Convolution2DFlipout", arguments, x, y)
        return method, peer, {**facts, **found}
    return *layer_pair(make(), keras.layers.Conv2D(*arguments), None, x, y), facts


def posterior_samples(conv=False, samples=16):
    """K draws of a network's weights in one call, against a loop over K calls."""
    if conv:
        x = normal(8, 8, 8, 1)
        body = [Conv2DFlipout(16, 3, activation="relu"), Conv2DFlipout(16, 3)]
        body.append(keras.layers.Flatten())
    else:
        x, body = normal(32, 64), [DenseFlipout(64, "relu"), DenseFlipout(64, "relu")]
    model = keras.Sequential([keras.Input(x.shape[1:]), *body, DenseFlipout(10)])
    together, one = PosteriorSamples(model, samples), PosteriorSamples(model, 1)
    x = tf.constant(x)
    calls = [tf.function(lambda m=m: m(x), jit_compile=True) for m in (together, one)]
    facts = {"shape": "conv 1->16->16, dense 10" if conv else "64->64->64->10"}
    facts["rows"] = len(x)
    return (
        lambda: calls[0]().numpy(),
        lambda: [calls[1]().numpy() for _ in range(samples)],
        {**facts, "samples": samples, "peer": f"{samples} calls for one"},
    )


def rev_gru(bits=3):
    """RevGRU(32 -> 256, 100 steps) against GRU, neither of them fused, 32 rows."""
    rows, steps = 32, 100
    pair = layer_pair(
        RevGRU(256, max_forget_bits=bits),
        keras.layers.GRU(256, use_cudnn=False),
        None,
        normal(rows, steps, 32),
        normal(rows, 256),
    )
    facts = {"shape": "32->256", "rows": rows, "steps": steps, "max_forget_bits": bits}
    return *pair, {**facts, "tokens": rows * steps, "peer": "keras GRU"}


def kfac_conv_net(rows=128, subsample=1, **own):
    """K-FAC against SGD with momentum: the residual network for the digits.

    Factors every 10 and inverses every 100 updates, all of which a block of steps has.
    """
    random = np.random.default_rng(0)
    x = random.integers(0, 17, (rows, 8, 8, 1)).astype("float32")
    y = random.integers(0, 10, rows)
    periods = {"factor_update_period": 10, "inverse_update_period": 100}
    facts = {"rows": rows, "subsample": subsample, **periods, **own, "period": 100}
    pair = []
    for kfac in (True, False):
        keras.utils.set_random_seed(0)
        model = zoo.build("resnet8_digits")
        if kfac:
            optimizer = KFAC(model, 1e-3, subsample=subsample, **periods, **own)
        else:
            optimizer = keras.optimizers.SGD(1e-3, momentum=0.9)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        pair.append(train_step(model, optimizer, x, y, loss=loss))
    facts["parameters"] = model.count_params()
    return *pair, {**facts, "peer": "SGD with momentum"}


# claim -> (what builds it, the bar on its ratio or None where it is only reported)
CLAIMS = {
    "lookahead_adam": (lookahead_adam, 1.05),
    "dense_batch_ensemble": (dense_batch_ensemble, 1.15),
    "dense_batch_ensemble_first_layer": (partial(dense_batch_ensemble, True), None),
    "conv2d_batch_ensemble": (conv2d_batch_ensemble, 1.15),
    "conv2d_batch_ensemble_first_layer": (partial(conv2d_batch_ensemble, True), None),
    "dense_batch_ensemble_edward2": (dense_batch_ensemble_edward2, 1.0),
    **{
        f"batch_ensemble_{kind}_{'train' if train else 'predict'}_{m}": (
            partial(separate, kind, m, train),
            bar,
        )
        for kind, bar in (("dense", 0.6), ("wide_block", 1.1))
        for train in (False, True)
        for m in (4, 8, 16)
    },
    **{
        f"batch_ensemble_{m}_members_at_fixed_rows": (
            partial(members_at_fixed_rows, m),
            None,
        )
        for m in (2, 4, 8, 16, 32)
    },
    "dense_flipout": (dense_flipout, 2.3),
    "dense_flipout_batch_1": (partial(dense_flipout, 1), None),
    "dense_flipout_batch_32": (partial(dense_flipout, 32), None),
    "dense_flipout_batch_128": (partial(dense_flipout, 128), None),
    "dense_flipout_tfp": (partial(dense_flipout, tfp=True), 0.9),
    "conv2d_flipout": (conv2d_flipout, 2.3),
    "conv2d_flipout_batch_1": (partial(conv2d_flipout, 1), None),
    "conv2d_flipout_batch_128": (partial(conv2d_flipout, 128), None),
    "conv2d_flipout_tfp": (partial(conv2d_flipout, tfp=True), 0.9),
    "posterior_samples": (posterior_samples, 0.5),
    "posterior_samples_conv": (partial(posterior_samples, True), None),
    "rev_gru": (rev_gru, 2.2),
    "kfac_conv_net": (kfac_conv_net, 1.4),
    "kfac_conv_net_every_fourth": (partial(kfac_conv_net, subsample=4), 1.4),
    "kfac_conv_net_32": (partial(kfac_conv_net, 32), None),
}


def main(argv=None):
    """Measures the claims that match, prints and records them; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args(argv)
    names = fnmatch.filter(CLAIMS, arguments.pattern)
    if not names:
        parser.error(f"expected a pattern that matches one of {list(CLAIMS)}")
    missed = []
    for name in names:
        build, bar = CLAIMS[name]
        method, peer, setting = build()
        record = compared(name, method, peer, setting, arguments.rounds, bar)
        if not arguments.no_record:
            command = f"python benchmarks/step_time.py {name}"
            results.append(RESULTS, {"command": command, **record})
        if bar and record["ratio"] > bar:
            missed.append(name)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
