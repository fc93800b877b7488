"""What BatchEnsemble's convolutions in one, two and three dimensions share."""

import numpy as np

from ..ops.arguments import integer
from .base import ChannelBatchEnsemble


class ConvBatchEnsemble(ChannelBatchEnsemble):
    """A convolution with M members; a subclass says which: `plain` is Keras's class."""

    plain = None

    def __init__(
        self,
        filters,
        kernel_size,
        rank=1,
        ensemble_size=4,
        alpha_initializer="ones",
        gamma_initializer="ones",
        strides=1,
        padding="valid",
        data_format=None,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        dilation_rate=1,
        groups=1,
        **kwargs,
    ):
        super().__init__(
            rank=rank,
            ensemble_size=ensemble_size,
            activation=activation,
            use_bias=use_bias,
            alpha_initializer=alpha_initializer,
            gamma_initializer=gamma_initializer,
            bias_initializer=bias_initializer,
            bias_regularizer=bias_regularizer,
            bias_constraint=bias_constraint,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        self.filters = integer("filters", filters)
        self._share(
            self.plain,
            {
                "filters": self.filters,
                "kernel_size": kernel_size,
                "strides": strides,
                "padding": padding,
                "data_format": data_format,
                "dilation_rate": dilation_rate,
                "groups": groups,
                "kernel_initializer": kernel_initializer,
                "kernel_regularizer": kernel_regularizer,
                "kernel_constraint": kernel_constraint,
            },
            use_bias=False,
        )

    def _outer(self, r, s):
        # Of an input's channel, W has the outputs of its group alone.
        groups = self.shared.groups
        r, s = r.reshape(groups, -1, 1), s.reshape(groups, 1, -1)
        return np.concatenate(list(r * s), axis=-1)
