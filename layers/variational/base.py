"""What all layers have in common whose kernels and biases are distributions."""

import math
import numbers

import keras
from keras import ops

from .distributions import (
    MEAN_FIELD_NORMAL,
    POINT,
    STANDARD_NORMAL,
    kl_divergence,
)
from .mode import MEAN, Samples, mode
from .weight import PARTS, VariationalWeight, checked_function, serialize

FUNCTIONS = tuple(f"{kind}_{part}" for kind in ("kernel", "bias") for part in PARTS)


class VariationalLayer(keras.layers.Layer):
    """A layer that draws its kernel and its bias from posteriors at each call.

    A subclass says what the map is (`linear`, `_weight_shapes`, `_sign_shapes`,
    `_bias_at_channels`) and how it is estimated (`estimator`, of estimators.py).
    """

    estimator = None

    def __init__(
        self,
        *,
        activation=None,
        kernel_posterior_fn=MEAN_FIELD_NORMAL,
        kernel_prior_fn=STANDARD_NORMAL,
        kernel_divergence_fn=kl_divergence,
        bias_posterior_fn=POINT,
        bias_prior_fn=None,
        bias_divergence_fn=kl_divergence,
        num_examples=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.activation = keras.activations.get(activation)
        functions = {
            "kernel_posterior_fn": kernel_posterior_fn,
            "kernel_prior_fn": kernel_prior_fn,
            "kernel_divergence_fn": kernel_divergence_fn,
            "bias_posterior_fn": bias_posterior_fn,
            "bias_prior_fn": bias_prior_fn,
            "bias_divergence_fn": bias_divergence_fn,
        }
        for name, function in functions.items():
            setattr(self, name, checked_function(name, function))
        self.num_examples = check_num_examples(num_examples)
        self._first_divergence_weight = 1.0
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        """Makes the parameters of the posteriors and priors."""
        kernel_shape, bias_shape = self._weight_shapes(input_shape)
        self.kernel = VariationalWeight(self, "kernel", kernel_shape)
        self.estimator.check(self.kernel.posterior)
        self.bias = None
        if self.bias_posterior_fn is not None and bias_shape is not None:
            self.bias = VariationalWeight(self, "bias", bias_shape)
        # β, which an annealing callback changes.
        self.divergence_weight = self.add_weight(
            name="divergence_weight",
            shape=(),
            dtype=self.kernel.dtype,
            initializer=keras.initializers.Constant(self._first_divergence_weight),
            trainable=False,
            autocast=False,
        )

    def set_divergence_weight(self, beta):
        """Sets β, the part of their weight that the divergences count for."""
        if self.built:
            self.divergence_weight.assign(beta)
        else:
            self._first_divergence_weight = float(beta)

    def divergence_scale(self):
        """β / N: what the divergences count for in the loss."""
        return self.divergence_weight / (self.num_examples or 1)

    def call(self, inputs):
        """Returns outputs for one draw of the bias and of each row's kernel."""
        inputs = ops.cast(inputs, self.compute_dtype)
        now, seed, q = mode(), self.seed_generator, self.kernel.posterior
        if isinstance(now, Samples):
            return self.activation(self._of_samples(inputs, now))
        noise = None
        if now is None:
            shapes = self._sign_shapes(ops.shape(inputs))
            noise = self.estimator.draw(q, shapes, seed, self.compute_dtype)
        outputs = self.estimator.apply(self.linear, inputs, q, noise)
        if self.bias is not None:
            bias = self.bias.posterior
            bias = bias.mean() if now is MEAN else bias.sample(seed)
            outputs = self._with_bias(outputs, bias)
        return self.activation(outputs)

    def _of_samples(self, inputs, samples):
        """Outputs of K draws of the weights, row n of that of n mod K."""
        rows, *rest = ops.shape(inputs)
        count = samples.count
        inputs = ops.reshape(inputs, (rows // count, count, *rest))
        kernels = self.kernel.posterior.sample(samples.seed(self.kernel), count)
        kernels = ops.cast(kernels, self.compute_dtype)
        elements = [ops.moveaxis(inputs, 1, 0), kernels]
        if self.bias is not None:
            elements.append(self.bias.posterior.sample(samples.seed(self.bias), count))

        def one(elements):
            x, kernel, *bias = elements
            y = self.linear(x, kernel)
            return self._with_bias(y, *bias) if bias else y

        outputs = ops.moveaxis(ops.vectorized_map(one, tuple(elements)), 0, 1)
        return ops.reshape(outputs, (rows, *ops.shape(outputs)[2:]))

    def _with_bias(self, outputs, bias):
        return outputs + self._bias_at_channels(ops.cast(bias, self.compute_dtype))

    @property
    def kernel_posterior(self):
        """q of the kernel."""
        return self.kernel.posterior

    @property
    def kernel_prior(self):
        """p of the kernel, or None."""
        return self.kernel.prior

    @property
    def bias_posterior(self):
        """q of the bias, or None."""
        return self.bias and self.bias.posterior

    @property
    def bias_prior(self):
        """p of the bias, or None."""
        return self.bias and self.bias.prior

    def save_own_variables(self, store):
        """Saves the state of the random numbers too, which Keras does not."""
        super().save_own_variables(store)
        store["seed"] = self.seed_generator.state

    def load_own_variables(self, store):
        """Loads what `save_own_variables` saves."""
        names = [name for name in store.keys() if name != "seed"]
        super().load_own_variables({name: store[name] for name in names})
        self.seed_generator.state.assign(store["seed"])

    def get_config(self):
        """Returns the constructor's arguments that all these layers take."""
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "activity_regularizer": keras.regularizers.serialize(
                self.activity_regularizer
            ),
            **{name: serialize(name, getattr(self, name)) for name in FUNCTIONS},
            "num_examples": self.num_examples,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        """Makes a layer from what `get_config` returns."""
        functions = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in FUNCTIONS
            if name in config
        }
        return super().from_config({**config, **functions})


def check_num_examples(num_examples):
    """Returns N, or None, or raises a ValueError."""
    if num_examples is None:
        return None
    number = isinstance(num_examples, numbers.Real) and not isinstance(
        num_examples, bool
    )
    if number and 0 < num_examples < math.inf:
        return num_examples
    raise ValueError(
        "expected `num_examples` to be a number above 0, or None. "
        f"Received: num_examples={num_examples!r}"
    )


def variational_layers(model):
    """The variational layers of a model or layer, or a ValueError if it has none."""
    found = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, VariationalLayer)
    ]
    if found:
        return found
    raise ValueError(
        "expected a model with layers that have distributions over their weights. "
        f"Received: {model.name}, which has none"
    )
