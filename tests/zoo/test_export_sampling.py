"""Models with distributions over their weights, exported."""

import keras
import numpy as np
import pytest
from keras import ops

from kzoo.layers import (
    DenseFlipout,
    MeanAndVariance,
    MeanFieldNormal,
    PosteriorMean,
    PosteriorSamples,
)
from kzoo.zoo.export import export
from kzoo.zoo.serving.client import connect
from kzoo.zoo.serving.server import Server

pytestmark = pytest.mark.tensorflow

X = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


def network():
    wide = MeanFieldNormal(
        loc_initializer=keras.initializers.RandomNormal(0.0, 1.0),
        untransformed_scale_initializer="zeros",
    )
    options = {"kernel_posterior_fn": wide, "bias_posterior_fn": wide}
    layers = [DenseFlipout(6, "tanh", **options), DenseFlipout(3, **options)]
    return keras.Sequential([keras.Input((4,), name="x"), *layers])


def test_exported_with_a_signature_that_samples(tmp_path):
    import tensorflow as tf

    model = network()
    path = export(model, tmp_path, name="net", xla=True)
    served = tf.saved_model.load(path).signatures
    assert sorted(served) == ["sampling", "serving_default", "serving_xla"]
    mean = numpy(ops.softmax(PosteriorMean(model)(X)))
    for signature in ("serving_default", "serving_xla"):
        for _ in range(2):
            answer = served[signature](x=tf.constant(X))
            np.testing.assert_allclose(answer["probabilities"], mean, 1e-4, 1e-5)
    for samples in (1, 64):
        logits = PosteriorSamples(model, samples, seed=7)(X)
        answer = served["sampling"](
            x=tf.constant(X), samples=tf.constant(samples), seed=tf.constant(7)
        )
        probs = numpy(ops.softmax(logits))
        np.testing.assert_allclose(answer["member_probabilities"], probs, 1e-4, 1e-5)
        average = probs.mean(1)
        np.testing.assert_allclose(answer["probabilities"], average, 1e-4, 1e-5)
        entropy = -(average * np.log(average)).sum(-1)
        np.testing.assert_allclose(answer["predictive_entropy"], entropy, 1e-4)
        shared = -(probs * np.log(probs)).sum(-1).mean(1)
        np.testing.assert_allclose(
            answer["mutual_information"], entropy - shared, 1e-3, 1e-5
        )
    for samples in (0, 1025):
        with pytest.raises(tf.errors.InvalidArgumentError, match="`samples` must be"):
            served["sampling"](
                x=tf.constant(X),
                samples=tf.constant(samples),
                seed=tf.constant(7),
            )


def test_an_input_named_as_that_of_the_signature_is_refused(tmp_path):
    layers = [keras.Input((4,), name="seed"), DenseFlipout(3)]
    with pytest.raises(ValueError, match="Received: inputs \\['seed'\\]"):
        export(keras.Sequential(layers), tmp_path, name="net")
    assert not list(tmp_path.glob("net/1"))


def test_another_function_has_both_signatures(tmp_path):
    import tensorflow as tf

    model = network()
    path = export(model, tmp_path, name="net", function=lambda x: {"y": model(x)})
    served = tf.saved_model.load(path).signatures
    mean, drawn = PosteriorMean(model), PosteriorSamples(model, 16, seed=7)
    for signature in ("serving_default", "serving_xla"):
        answer = served[signature](x=tf.constant(X))
        np.testing.assert_allclose(answer["y"], numpy(mean(X)), 1e-4, 1e-5)
    answer = served["sampling"](
        x=tf.constant(X), samples=tf.constant(16), seed=tf.constant(7)
    )
    np.testing.assert_allclose(answer["y"], numpy(drawn(X)), 1e-4, 1e-5)


def test_asked_over_rest(tmp_path):
    model = network()
    export(model, tmp_path, name="net", xla=False)
    drawn = numpy(ops.softmax(PosteriorSamples(model, 8, seed=2)(X)))
    with Server({"net": str(tmp_path / "net")}, rest_port=0) as server:
        client = connect(server.rest_url)
        request = {"x": X, "samples": np.int32(8), "seed": np.int32(2)}
        answer = client.predict("net", request, signature="sampling")
        np.testing.assert_allclose(answer["member_probabilities"], drawn, 1e-4, 1e-5)
        for samples in (0, 2000):
            bad = {**request, "samples": np.int32(samples)}
            with pytest.raises(Exception, match="`samples` must be"):
                client.predict("net", bad, signature="sampling")
        again = client.predict("net", request, signature="sampling")
        np.testing.assert_array_equal(again["probabilities"], answer["probabilities"])


def test_a_regressor_has_both_signatures(tmp_path):
    import tensorflow as tf

    layers = [DenseFlipout(6, "tanh"), DenseFlipout(4), MeanAndVariance(3.0, 2.0)]
    model = keras.Sequential([keras.Input((4,), name="x"), *layers])
    served = tf.saved_model.load(export(model, tmp_path, name="net")).signatures
    mean = PosteriorMean(model)(X)
    for signature in ("serving_default", "serving_xla"):
        answer = served[signature](x=tf.constant(X))
        np.testing.assert_allclose(answer["mean"], numpy(mean[..., 0]), 1e-4)
        np.testing.assert_allclose(answer["variance"], numpy(mean[..., 1]), 1e-4)
    drawn = numpy(PosteriorSamples(model, 16, seed=7)(X))
    answer = served["sampling"](
        x=tf.constant(X), samples=tf.constant(16), seed=tf.constant(7)
    )
    np.testing.assert_allclose(answer["mean"], drawn[..., 0].mean(1), 1e-4)
    epistemic, aleatoric = drawn[..., 0].var(1), drawn[..., 1].mean(1)
    np.testing.assert_allclose(answer["epistemic_variance"], epistemic, 1e-3)
    np.testing.assert_allclose(answer["variance"], epistemic + aleatoric, 1e-4)
