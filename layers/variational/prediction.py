"""Models that predict by the mean or by samples of another model's posteriors."""

import keras

from ..ops.arguments import integer
from .mode import at_posterior_mean, at_posterior_samples, can_sample


class _Predictor(keras.Model):
    """A model that calls another one, whose weights are its own."""

    def __init__(self, model, **kwargs):
        if not can_sample(model):
            raise ValueError(
                "expected a model with layers that have distributions over their "
                "weights, or with `MonteCarloDropout`. "
                f"Received: {model.name}, which has none"
            )
        super().__init__(**kwargs)
        self.model = model

    def get_config(self):
        """Returns the constructor's arguments."""
        model = keras.saving.serialize_keras_object(self.model)
        return {"name": self.name, "model": model}

    @classmethod
    def from_config(cls, config):
        """Makes a model from what `get_config` returns."""
        model = keras.saving.deserialize_keras_object(config["model"])
        return cls(**{**config, "model": model})


@keras.saving.register_keras_serializable(package="kzoo")
class PosteriorMean(_Predictor):
    """A Bayesian model as it is with its posteriors' means: nothing is drawn.

    A model like any other: `predict`, `evaluate` and, once it was called, Keras's
    `export` work. It shares its weights with the model that it is made from, and
    follows its training; train that one, not this.

    Args:
        model: A `keras.Model` with variational layers or `MonteCarloDropout`.
        **kwargs: `keras.Model`'s arguments, such as `name`.

    Call arguments:
        inputs: As the model's.

    Input shape:
        The model's.

    Output shape:
        The model's.

    Raises:
        ValueError: If the model has no such layers.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import DenseFlipout, PosteriorMean
    >>> model = keras.Sequential([keras.Input((5,)), DenseFlipout(3)])
    >>> x = np.ones((2, 5), "float32")
    >>> y = PosteriorMean(model).predict(x, verbose=0)
    >>> bool((y[0] == y[1]).all())
    True
    """

    def call(self, inputs):
        """Returns the model's outputs at the posterior mean."""
        return at_posterior_mean(self.model, inputs, training=False)


@keras.saving.register_keras_serializable(package="kzoo")
class PosteriorSamples(_Predictor):
    """K models drawn from a Bayesian model's posteriors, in one compiled call.

    Draws K weights of every variational layer, whatever its estimator, so that sample
    k is one function for all rows of a batch, independent of the other samples; a
    layer that is used twice has the same weights both times. With an integer `seed` it
    is the same function for all batches and calls; without one, each replica of a
    `tf.distribute` strategy draws its own. All layers see each row K times,
    one copy after the other: the model may repeat its batch, as an ensemble does, but
    not merge the batch's axis with one that comes after it. (On TensorFlow,
    convolutions run sample by sample, in a loop inside of the call.)

    A model like any other: `predict`, `evaluate` and, once it was called, Keras's
    `export` work. It shares its weights with the model that it is made from, and
    follows its training; train that one, not this.

    Args:
        model: A `keras.Model` with variational layers or `MonteCarloDropout`.
        samples: K.
        seed: Integer; or None for new weights at each batch.
        **kwargs: `keras.Model`'s arguments, such as `name`.

    Call arguments:
        inputs: As the model's.

    Input shape:
        The model's.

    Output shape:
        The model's, with an axis of K after the batch's.

    Raises:
        ValueError: If the model has no such layers, or `samples` is no integer
            of at least 1.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import DenseFlipout, PosteriorSamples
    >>> model = keras.Sequential([keras.Input((5,)), DenseFlipout(3)])
    >>> x = np.ones((2, 5), "float32")
    >>> y = PosteriorSamples(model, 16, seed=0).predict(x, verbose=0)
    >>> y.shape
    (2, 16, 3)
    >>> mean, stddev = y.mean(axis=1), y.std(axis=1)
    """

    def __init__(self, model, samples, seed=None, **kwargs):
        super().__init__(model, **kwargs)
        self.samples = integer("samples", samples)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs):
        """Returns the outputs of the K models."""
        seed = self.seed_generator if self.seed is None else self.seed

        def predict(inputs):
            return self.model(inputs, training=False)

        return at_posterior_samples(predict, inputs, self.samples, seed)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "samples": self.samples, "seed": self.seed}
