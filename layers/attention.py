"""Keras's multi-head attention with projections of another kind."""

import string

import keras
from keras import ops

from .ops.arguments import integer
from .ops.random import bernoulli


class Dropout(keras.layers.Dropout):
    """Keras's dropout by draws that XLA does not change, and whose state is saved."""

    def call(self, inputs, training=False):
        """Returns the inputs, some of them 0 in training."""
        if not training or not self.rate:
            return inputs
        keep = 1 - self.rate
        seed, shape = self.seed_generator, ops.shape(inputs)
        return inputs * bernoulli(shape, seed, keep, inputs.dtype) / keep

    def save_own_variables(self, store):
        """Saves the state of the random numbers, which Keras does not."""
        if self.rate:
            store["seed"] = self.seed_generator.state

    def load_own_variables(self, store):
        """Loads what `save_own_variables` saves."""
        if self.rate:
            self.seed_generator.state.assign(store["seed"])


class ProjectedAttention(keras.layers.MultiHeadAttention):
    """Attention whose projections are what a subclass makes, by `_make_projections`.

    Keras's layer makes its projections in `build`; here they are made before, so that
    whoever looks for layers of their kind finds them, and `build` builds them.
    """

    def __init__(
        self, num_heads, key_dim, *, flash_attention=None, seed=None, **kwargs
    ):
        if seed is not None:
            seed = integer("seed", seed, 0)
        super().__init__(
            num_heads, key_dim, flash_attention=flash_attention, seed=seed, **kwargs
        )
        if flash_attention and self.value_dim != self.key_dim:
            raise ValueError(
                "expected `value_dim` to be `key_dim` with flash attention. "
                f"Received: value_dim={self.value_dim}, key_dim={self.key_dim}"
            )
        self.flash_attention = flash_attention

    def _make_projections(self, project):
        """Makes the projections, once the constructor knows all.

        Args:
            project: Function that makes one, a layer that keeps the sizes of its
                output's last axes as `partial_output_shape`. It takes by name `name`,
                `equation`, `output_shape`, `activation` and `bias_axes`, as
                `keras.layers.EinsumDense` does.
        """
        bias = self.use_bias

        def to_heads(name, size, activation=None):
            # n: heads, h: a head's channels, c: the input's.
            return project(
                name=name,
                equation="...c,cnh->...nh",
                output_shape=(self.num_heads, size),
                activation=activation,
                bias_axes="nh" if bias else None,
            )

        self._query_dense = to_heads("query", self.key_dim)
        self._key_dense = to_heads("key", self.key_dim)
        self._value_dense = to_heads("value", self.value_dim)
        if self._use_gate:
            self._gate_dense = to_heads("gate", self.value_dim, "sigmoid")
        # None: a size that is known when the layer is built.
        sizes = self._output_shape or (None,)
        free = [letter for letter in string.ascii_letters if letter not in "nh"]
        out = "".join(free[: len(sizes)])
        self._output_dense = project(
            name="attention_output",
            equation=f"...nh,nh{out}->...{out}",
            output_shape=sizes,
            activation=None,
            bias_axes=out if bias else None,
        )

    def build(self, query_shape, value_shape, key_shape=None):
        """Builds the projections."""
        key_shape = value_shape if key_shape is None else key_shape
        if tuple(value_shape[1:-1]) != tuple(key_shape[1:-1]):
            raise ValueError(
                "expected `value` and `key` to have equal axes but the last. Received: "
                f"value of shape {tuple(value_shape)}, key of shape {tuple(key_shape)}"
            )
        if not self._output_shape:
            self._output_dense.partial_output_shape = (query_shape[-1],)
        self._query_dense.build(query_shape)
        self._key_dense.build(key_shape)
        self._value_dense.build(value_shape)
        if self._use_gate:
            self._gate_dense.build(query_shape)
        self._output_dense.build((*query_shape[:-1], self.num_heads, self.value_dim))
        self._build_attention(len(query_shape) + 1)

    def _build_attention(self, rank):
        super()._build_attention(rank)
        self._tracker.untrack(self._dropout_layer)  # Keras's, whose draws XLA changes.
        self._dropout_layer = Dropout(
            self.dropout, seed=self.seed, dtype=self.dtype_policy, name="dropout"
        )

    def _compute_attention(
        self,
        query,
        key,
        value,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
    ):
        # JAX's fused attention, which Keras takes where nobody asks for the scores,
        # refuses values of another size than keys.
        scores = return_attention_scores or self.value_dim != self.key_dim
        return super()._compute_attention(
            query, key, value, attention_mask, training, scores
        )

    def compute_output_spec(self, query, value, *args, **kwargs):
        """Returns the outputs' shapes; of the scores not Keras's, which has T for S."""
        spec = super().compute_output_spec(query, value, *args, **kwargs)
        if not isinstance(spec, tuple):
            return spec
        axes = self.attention_axes
        kept = [i for i in range(len(query.shape) - 1) if i not in axes]
        batch = [query.shape[i] for i in kept]
        lengths = [x.shape[i] for x in (query, value) for i in axes]
        scores = (*batch, self.num_heads, *lengths)
        return spec[0], keras.KerasTensor(scores, dtype=self.compute_dtype)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "flash_attention": self.flash_attention}
