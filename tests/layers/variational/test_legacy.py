"""Weights from `tf_keras` models of TensorFlow Probability's and edward2's layers."""

import keras
import numpy as np
import pytest
from keras import ops

from kzoo import layers
from kzoo.layers import (
    Conv2DFlipout,
    DenseFlipout,
    DenseLocalReparameterization,
    DenseReparameterization,
    EmbeddingReparameterization,
    MeanFieldNormal,
    NormalPrior,
    PosteriorMean,
    load_legacy_weights,
)

rng = np.random.default_rng(0)
MEAN_FIELD = MeanFieldNormal()


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def randomize(legacy):
    """Gives a legacy model weights as training might, the variances above 0."""
    for w in legacy.weights:
        if "untransformed" in w.name or "stddev" in w.name:
            w.assign(rng.normal(-2, 1, size=w.shape))
        elif "variance" in w.name:
            w.assign(rng.uniform(0.5, 2, size=w.shape))
        else:
            w.assign(rng.normal(size=w.shape))
    return legacy


@pytest.fixture(scope="module")
def tf_keras():
    return pytest.importorskip("tf_keras")


@pytest.fixture(scope="module")
def tfp():
    return pytest.importorskip("tensorflow_probability")


def of_tfp(tf_keras, tfp, estimator="Flipout", outputs=2):
    """A convolution, batch normalization, a model inside, a bias that is drawn."""
    mean_field = tfp.layers.default_mean_field_normal_fn
    conv = getattr(tfp.layers, f"Convolution2D{estimator}")
    dense = getattr(tfp.layers, f"Dense{estimator}")
    inner = [
        tf_keras.layers.Dense(4, activation="tanh"),
        dense(3, activation="relu", bias_posterior_fn=mean_field()),
    ]
    return randomize(
        tf_keras.Sequential(
            [
                tf_keras.Input((5, 5, 2)),
                conv(3, 3, padding="same", activation="relu"),
                tf_keras.layers.BatchNormalization(),
                tf_keras.layers.Flatten(),
                tf_keras.Sequential([tf_keras.Input((75,)), *inner]),
                tf_keras.layers.Dropout(0.5),
                dense(outputs, bias_posterior_fn=None),
            ]
        )
    )


def twin(estimator="Flipout", outputs=2, **kwargs):
    conv = getattr(layers, f"Conv2D{estimator}")
    dense = getattr(layers, f"Dense{estimator}")
    inner = [
        keras.layers.Dense(4, activation="tanh"),
        dense(3, "relu", bias_posterior_fn=MEAN_FIELD),
    ]
    return keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            conv(3, 3, padding="same", activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.Sequential([keras.Input((75,)), *inner]),
            keras.layers.Dropout(0.5),
            dense(outputs, bias_posterior_fn=None, **kwargs),
        ]
    )


def at_the_mean(legacy, x):
    """What a legacy model of TFP's layers predicts at the posteriors' means."""
    for layer in legacy.layers:
        if hasattr(layer, "layers"):
            x = at_the_mean(layer, x)
        elif not hasattr(layer, "kernel_posterior"):
            x = layer(x, training=False)
        else:
            kernel, bias = layer.kernel_posterior.mean(), layer.bias_posterior
            convolves = len(kernel.shape) == 4
            x = ops.conv(x, kernel, padding="same") if convolves else x @ kernel
            x = layer.activation(x + (0 if bias is None else bias.mean()))
    return numpy(x)


def check_equal(posterior, legacy):
    np.testing.assert_allclose(numpy(posterior.mean()), legacy.mean(), 1e-6)
    np.testing.assert_allclose(numpy(posterior.stddev()), legacy.stddev(), 2e-6)


@pytest.mark.tensorflow
@pytest.mark.parametrize("estimator", ["Flipout", "Reparameterization"])
def test_the_twin_has_the_posteriors_of_tfp(tf_keras, tfp, estimator):
    legacy, model = of_tfp(tf_keras, tfp, estimator), twin(estimator)
    load_legacy_weights(model, legacy)
    for ours, theirs in (
        (model.layers[0], legacy.layers[0]),
        (model.layers[3].layers[1], legacy.layers[3].layers[1]),
        (model.layers[5], legacy.layers[5]),
    ):
        check_equal(ours.kernel_posterior, theirs.kernel_posterior)
    check_equal(
        model.layers[3].layers[1].bias_posterior,
        legacy.layers[3].layers[1].bias_posterior,
    )
    x = rng.normal(size=(3, 5, 5, 2)).astype("float32")
    y = PosteriorMean(model).predict(x, verbose=0)
    np.testing.assert_allclose(y, at_the_mean(legacy, x), 1e-5, 1e-5)


@pytest.mark.tensorflow
def test_local_reparameterization_and_functions_of_tfp(tf_keras, tfp):
    mean_field = tfp.layers.default_mean_field_normal_fn()
    theirs = tfp.layers.DenseLocalReparameterization(3)
    legacy = randomize(tf_keras.Sequential([tf_keras.Input((4,)), theirs]))
    for function in (MEAN_FIELD, mean_field):
        ours = DenseLocalReparameterization(3, kernel_posterior_fn=function)
        load_legacy_weights(keras.Sequential([keras.Input((4,)), ours]), legacy)
        check_equal(ours.kernel_posterior, theirs.kernel_posterior)
        np.testing.assert_array_equal(
            numpy(ours.bias_posterior.mean()), theirs.weights[2]
        )


@pytest.mark.tensorflow
def test_from_a_file_of_legacy_weights(tf_keras, tfp, tmp_path):
    trained = of_tfp(tf_keras, tfp)
    trained.save_weights(tmp_path / "trained.weights.h5")
    legacy = of_tfp(tf_keras, tfp)
    legacy.load_weights(tmp_path / "trained.weights.h5")
    model = twin()
    load_legacy_weights(model, legacy)
    check_equal(model.layers[-1].kernel_posterior, trained.layers[-1].kernel_posterior)


def of_edward2(tf_keras):
    """Layers with the variables of edward2's, which does not install everywhere.

    Its initializers are layers, that make random variables with a `distribution`.
    """
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    class TrainableNormal(tf_keras.layers.Layer):
        def build(self, shape):
            self.mean = self.add_weight("mean", shape)
            self.stddev = self.add_weight("stddev", shape)
            self.built = True

        def __call__(self, shape, dtype=None):
            if not self.built:
                self.build(shape)
            scale = tf.nn.softplus(self.stddev) + 1e-7
            normal = tfd.Independent(tfd.Normal(self.mean, scale), len(shape))
            drawn = tf.convert_to_tensor(normal.sample())
            return type("RandomVariable", (), {"value": drawn, "distribution": normal})

    class Dense(tf_keras.layers.Layer):
        def __init__(self, units, bias_initializer=None):
            super().__init__()
            self.units = units
            self.kernel_initializer = TrainableNormal()
            self.bias_initializer = bias_initializer

        def build(self, input_shape):
            self.kernel = self.kernel_initializer((input_shape[-1], self.units))
            if self.bias_initializer is None:
                self.bias = self.add_weight("bias", (self.units,))
            else:
                self.bias = self.bias_initializer((self.units,))

        def call(self, x):
            return x @ self.kernel_initializer((x.shape[-1], self.units)).value

    class Embedding(tf_keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.embeddings_initializer = TrainableNormal()

        def build(self, input_shape):
            self.embeddings = self.embeddings_initializer((6, 4))

        def call(self, ids):
            return tf.gather(self.embeddings_initializer((6, 4)).value, ids)

    return randomize(
        tf_keras.Sequential(
            [
                tf_keras.Input((3,), dtype="int32"),
                Embedding(),
                tf_keras.layers.GlobalAveragePooling1D(),
                Dense(3),
                Dense(2, TrainableNormal()),
            ]
        )
    )


@pytest.mark.tensorflow
def test_the_twin_has_the_posteriors_of_edward2(tf_keras):
    legacy = of_edward2(tf_keras)
    model = keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            EmbeddingReparameterization(6, 4),
            keras.layers.GlobalAveragePooling1D(),
            DenseFlipout(3),
            DenseReparameterization(2, bias_posterior_fn=MEAN_FIELD),
        ]
    )
    load_legacy_weights(model, legacy)
    found = [
        (model.layers[0].kernel_posterior, legacy.layers[0].embeddings_initializer),
        (model.layers[2].kernel_posterior, legacy.layers[2].kernel_initializer),
        (model.layers[3].kernel_posterior, legacy.layers[3].kernel_initializer),
        (model.layers[3].bias_posterior, legacy.layers[3].bias_initializer),
    ]
    for ours, theirs in found:
        np.testing.assert_array_equal(numpy(ours.mean()), theirs.mean)
        # σ = softplus(ρ) + 1e-7.
        expected = np.log1p(np.exp(theirs.stddev.numpy().astype("float64"))) + 1e-7
        np.testing.assert_allclose(numpy(ours.stddev()), expected, 2e-6)
    bias = model.layers[2].bias_posterior.mean()
    np.testing.assert_array_equal(numpy(bias), legacy.layers[2].bias)


def refused(model, legacy, message):
    """Requires a ValueError with the message, and nothing assigned."""
    before = [w.numpy() for w in model.variables]
    with pytest.raises(ValueError, match=message):
        load_legacy_weights(model, legacy)
    for w, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(w.numpy(), value)


@pytest.mark.tensorflow
def test_what_does_not_fit_is_named_and_nothing_is_assigned(tf_keras, tfp):
    legacy = of_tfp(tf_keras, tfp)
    last = legacy.layers[-1].name
    shapes = r"expected weights of shapes \[\(3, 4\), \(3, 4\)\]. Received: \[\(3, 2\)"
    refused(
        twin(outputs=4), legacy, f"does not fit the legacy model's '{last}': {shapes}"
    )
    point = MeanFieldNormal(is_singular=True)
    refused(
        twin(kernel_posterior_fn=point), legacy, "a point. Received: a distribution"
    )
    wide = NormalPrior()  # No posterior, but it is one to be told.
    refused(twin(kernel_posterior_fn=wide), legacy, "MeanFieldNormal")
    with_bias = keras.Sequential([keras.Input((3,)), DenseFlipout(2)])
    without = tf_keras.Sequential(
        [tf_keras.Input((3,)), tfp.layers.DenseFlipout(2, bias_posterior_fn=None)]
    )
    refused(with_bias, without, "expected a bias that is a point. Received: none")
    # The other order, or other layers.
    swapped = keras.Sequential(
        [keras.Input((5, 5, 2)), keras.layers.BatchNormalization(), Conv2DFlipout(3, 3)]
    )
    refused(swapped, legacy, "layer 'batch_normalization")
    plain = tf_keras.Sequential([tf_keras.Input((3,)), tf_keras.layers.Dense(2)])
    refused(with_bias, plain, "with a scale. Received: a point")
    refused(
        keras.Sequential([keras.Input((5, 5, 2)), Conv2DFlipout(3, 3)]),
        legacy,
        "as many",
    )


@pytest.mark.tensorflow
def test_posteriors_of_other_kinds_are_refused(tf_keras, tfp):
    def laplace(dtype, shape, name, trainable, add_variable_fn):
        loc = add_variable_fn(name, shape, dtype=dtype, trainable=trainable)
        return tfp.distributions.Independent(
            tfp.distributions.Laplace(loc, 1.0), len(shape)
        )

    def learned(dtype, shape, name, trainable, add_variable_fn):
        loc = add_variable_fn("own", shape, dtype=dtype, trainable=trainable)
        return tfp.distributions.Independent(
            tfp.distributions.Normal(loc, 1.0), len(shape)
        )

    model = keras.Sequential([keras.Input((3,)), DenseReparameterization(2)])
    for arguments, message in (
        (
            {"kernel_posterior_fn": laplace, "kernel_prior_fn": None},
            "independent entries",
        ),
        ({"kernel_prior_fn": learned}, "no weights but of its posteriors"),
    ):
        layer = tfp.layers.DenseReparameterization(2, **arguments)
        legacy = tf_keras.Sequential([tf_keras.Input((3,)), layer])
        refused(model, legacy, message)


@pytest.mark.tensorflow
def test_refuses_what_is_no_built_model(tf_keras):
    legacy = tf_keras.Sequential([tf_keras.Input((3,)), tf_keras.layers.Dense(2)])
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    for arguments in ((legacy, legacy), (keras.Sequential(), legacy)):
        with pytest.raises(ValueError, match="expected `model` to be a built"):
            load_legacy_weights(*arguments)
    for given in (model, "model.h5", tf_keras.Sequential()):
        with pytest.raises(ValueError, match="expected `legacy_model` to be a built"):
            load_legacy_weights(model, given)


@pytest.mark.jax
def test_refuses_another_backend():
    with pytest.raises(ValueError, match="Received: 'jax'"):
        load_legacy_weights(None, None)


@pytest.mark.tensorflow
def test_normalization_computes_with_what_it_got():
    import tf_keras

    legacy = tf_keras.Sequential(
        [
            tf_keras.Input((3,)),
            tf_keras.layers.Normalization(),
            tf_keras.layers.Dense(2),
        ]
    )
    x = rng.normal(3, 2, (20, 3)).astype("float32")
    legacy.layers[0].adapt(x)
    plain = [keras.layers.Normalization(), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((3,)), *plain])
    load_legacy_weights(model, legacy)
    np.testing.assert_allclose(
        model.predict(x, verbose=0), legacy.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )
