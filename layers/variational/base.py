"""What all layers have in common with weights that are distributions."""

import math
import numbers

import keras
from keras import ops

from ..seeded import SeededLayer
from .distributions import (
    MEAN_FIELD_NORMAL,
    POINT,
    STANDARD_NORMAL,
    kl_divergence,
)
from .mode import MEAN, Sampled, Samples, mode
from .weight import PARTS, VariationalWeight, checked_function, serialize


class BayesianLayer(Sampled, SeededLayer):
    """A layer with weights that are distributions, whose divergences are losses.

    A subclass says what `kinds` of weights these are, gives `_set_functions` the
    functions that make them, and calls `_make_weights` when it is built.
    """

    # Backend -> what does not work there, and why; for the catalogue.
    limits = {
        "jax": "posteriors, priors and divergences are kzoo's own: TensorFlow "
        "Probability does not import beside current JAX"
    }
    kinds = ()

    def __init__(self, *, num_examples=None, **kwargs):
        super().__init__(**kwargs)
        self.num_examples = check_num_examples(num_examples)
        self._first_divergence_weight = 1.0

    def _set_functions(self, **functions):
        for name, function in functions.items():
            setattr(self, name, checked_function(name, function))

    def _make_weights(self, shapes):
        """Makes the parameters of the posteriors and priors, and β."""
        for kind, shape in zip(self.kinds, shapes, strict=True):
            weight = None
            if getattr(self, f"{kind}_posterior_fn") is not None and shape is not None:
                weight = VariationalWeight(self, kind, shape)
            elif kind != "bias":
                raise ValueError(
                    f"expected `{kind}_posterior_fn` to be a function: only a bias "
                    f"can be left out. Received: {kind}_posterior_fn=None"
                )
            setattr(self, kind, weight)
        # β, which an annealing callback changes.
        self.divergence_weight = self.add_weight(
            name="divergence_weight",
            shape=(),
            dtype=getattr(self, self.kinds[0]).dtype,
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

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            **{n: serialize(n, getattr(self, n)) for n in self._function_names()},
            "num_examples": self.num_examples,
        }

    @classmethod
    def from_config(cls, config):
        """Makes a layer from what `get_config` returns."""
        return super().from_config(cls.with_functions(config))

    @classmethod
    def with_functions(cls, config):
        """A configuration with functions in place of what stands for them."""
        functions = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in cls._function_names()
            if name in config
        }
        return {**config, **functions}

    @classmethod
    def _function_names(cls):
        return [f"{kind}_{part}" for kind in cls.kinds for part in PARTS]


class VariationalLayer(BayesianLayer):
    """A layer that draws its kernel and its bias from posteriors at each call.

    A subclass says what the map is (`linear`, `_weight_shapes`, `_sign_shapes`,
    `_bias_at_channels`) and how it is estimated (`estimator`, of estimators.py). One
    with other weights says their `kinds`, and gives `_set_functions` their functions.
    """

    estimator = None
    kinds = ("kernel", "bias")  # A bias may be left out.

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
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.activation = keras.activations.get(activation)
        self._set_functions(
            kernel_posterior_fn=kernel_posterior_fn,
            kernel_prior_fn=kernel_prior_fn,
            kernel_divergence_fn=kernel_divergence_fn,
            bias_posterior_fn=bias_posterior_fn,
            bias_prior_fn=bias_prior_fn,
            bias_divergence_fn=bias_divergence_fn,
        )

    def build(self, input_shape):
        """Makes the parameters of the posteriors and priors."""
        self._make_weights(self._weight_shapes(input_shape))
        for kind in self.kinds:
            if kind != "bias":
                self.estimator.check(getattr(self, kind).posterior)

    def call(self, inputs):
        """Returns outputs for one draw of the bias and of each row's kernel."""
        inputs = ops.cast(inputs, self.compute_dtype)
        now = mode()
        if isinstance(now, Samples):
            return self.activation(self._of_samples(inputs, now))
        kernel = self._drawn(self.kernel, self._sign_shapes(ops.shape(inputs)))
        outputs = self.estimator.apply(self.linear, inputs, kernel)
        if self.bias is not None:
            outputs = outputs + self._bias_at_channels(self._drawn_bias())
        return self.activation(outputs)

    def _of_samples(self, inputs, samples):
        """Outputs of K draws of the weights, row n of that of n mod K."""
        weights = self._drawn(self.kernel)
        if self.bias is not None:
            weights = (*weights, self._drawn_bias())

        def one(x, kernel, *bias):
            y = self.linear(x, kernel)
            return y + self._bias_at_channels(*bias) if bias else y

        return samples.apply(one, inputs, *weights)

    def _drawn(self, weight, sign_shapes=None):
        """A kernel as `estimator.apply` takes it: a draw, the mean, or K draws."""
        now, q = mode(), weight.posterior
        if now is None:
            seed, dtype = self.seed_generator, self.compute_dtype
            return self.estimator.draw(q, sign_shapes, seed, dtype)
        found = q.mean() if now is MEAN else q.sample(now.seed(weight), now.count)
        return (ops.cast(found, self.compute_dtype),)

    def _drawn_bias(self):
        """The bias: a draw, the mean, or K draws."""
        now, q = mode(), self.bias.posterior
        if now is None:
            found = q.sample(self.seed_generator)
        else:
            found = (
                q.mean() if now is MEAN else q.sample(now.seed(self.bias), now.count)
            )
        return ops.cast(found, self.compute_dtype)

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

    def get_config(self):
        """Returns the constructor's arguments that all these layers take."""
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "activity_regularizer": keras.regularizers.serialize(
                self.activity_regularizer
            ),
        }


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
        layer for layer in model._flatten_layers() if isinstance(layer, BayesianLayer)
    ]
    if found:
        return found
    raise ValueError(
        "expected a model with layers that have distributions over their weights. "
        f"Received: {model.name}, which has none"
    )
