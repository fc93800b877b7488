"""What every BatchEnsemble layer around a plain Keras layer has in common."""

import keras
from keras import ops

from ..ops.arguments import integer
from ..ops.batch_ensemble import batch_ensemble, check_rows
from ..ops.random import own_initializer


class BatchEnsembleLayer(keras.layers.Layer):
    """M members' fast weights and biases around one shared Keras layer.

    A subclass makes `self.shared`, the plain linear layer without bias or
    activation that owns the shared kernel, and says along which axis its channels
    lie. As an ordinary sublayer it can be frozen by itself
    (`layer.shared.trainable = False`), take LoRA, or be quantized.
    """

    channel_axis = -1

    def __init__(
        self,
        rank,
        ensemble_size,
        activation,
        use_bias,
        alpha_initializer,
        gamma_initializer,
        bias_initializer,
        bias_regularizer,
        bias_constraint,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.rank = integer("rank", rank)
        self.ensemble_size = integer("ensemble_size", ensemble_size)
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.alpha_initializer = own_initializer(alpha_initializer)
        self.gamma_initializer = own_initializer(gamma_initializer)
        self.bias_initializer = own_initializer(bias_initializer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.bias_constraint = keras.constraints.get(bias_constraint)

    @property
    def kernel(self):
        """The kernel W that all members share."""
        return self.shared.kernel

    def build(self, input_shape):
        """Creates the shared kernel, the fast weights and the members' biases."""
        self.shared.build(input_shape)
        self.input_spec = self.shared.input_spec
        members = (self.ensemble_size,)
        lead = members if self.rank == 1 else (self.rank, *members)
        output_shape = self.shared.compute_output_shape(input_shape)
        out = output_shape[self.channel_axis]
        self.alpha = self.add_weight(
            name="alpha",
            shape=(*lead, input_shape[self.channel_axis]),
            initializer=self.alpha_initializer,
        )
        self.gamma = self.add_weight(
            name="gamma", shape=(*lead, out), initializer=self.gamma_initializer
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(*members, out),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )

    def call(self, inputs):
        """Returns every member's output for its own rows."""
        # Integers become floats, as they do in the plain layer.
        if not keras.backend.is_float_dtype(inputs.dtype):
            inputs = ops.cast(inputs, self.compute_dtype)
        outputs = batch_ensemble(
            self.shared, inputs, self.alpha, self.gamma, self.bias, self.channel_axis
        )
        return self.activation(outputs)

    def compute_output_shape(self, input_shape):
        """Returns the shared layer's output shape."""
        check_rows(input_shape[0], self.ensemble_size)
        return self.shared.compute_output_shape(input_shape)

    def get_config(self):
        """Returns the constructor's arguments but the shared layer's own."""
        regularizers = keras.regularizers
        return {
            **super().get_config(),
            "rank": self.rank,
            "ensemble_size": self.ensemble_size,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "alpha_initializer": keras.initializers.serialize(self.alpha_initializer),
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "activity_regularizer": regularizers.serialize(self.activity_regularizer),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }

    def _shared_config(self, *names):
        """Returns these arguments as the shared layer's config has them."""
        config = self.shared.get_config()
        return {name: config[name] for name in names}
