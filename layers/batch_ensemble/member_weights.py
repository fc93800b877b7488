"""What the layers have in common that share nothing between BatchEnsemble's members."""

from ..ops.arguments import integer
from ..ops.batch_ensemble import check_rows


class MemberWeights:
    """Gives each weight of the Keras layer that follows it a first axis of members."""

    def __init__(self, ensemble_size=4, **kwargs):
        super().__init__(**kwargs)
        self.ensemble_size = integer("ensemble_size", ensemble_size)
        self.supports_masking = True

    def add_weight(self, shape, **kwargs):
        """Makes a weight for each of M members: `[M, *shape]`."""
        return super().add_weight(shape=(self.ensemble_size, *shape), **kwargs)

    def compute_output_shape(self, input_shape):
        """Returns the input's shape."""
        check_rows(input_shape[0], self.ensemble_size)
        return tuple(input_shape)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "ensemble_size": self.ensemble_size}
