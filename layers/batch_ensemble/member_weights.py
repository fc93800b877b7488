"""What the layers have in common that share nothing between BatchEnsemble's members."""

from ..conversion import counterpart, numpy
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

    def member(self, index):
        """Makes the plain Keras layer that one member is.

        Args:
            index: m, an integer from 0 to M - 1.

        Returns:
            A built layer of the class of Keras's that this one derives from, with the
            member's own weights.

        Raises:
            ValueError: If the layer is not built, or there is no such member.
        """
        m = integer("index", index, 0, self.ensemble_size - 1)
        classes = type(self).__mro__
        plain = counterpart(self, classes[classes.index(MemberWeights) + 1])
        for weight in self.weights:
            getattr(plain, weight.name).assign(numpy(weight)[m])
        return plain

    def compute_output_shape(self, input_shape):
        """Returns the input's shape."""
        check_rows(input_shape[0], self.ensemble_size)
        return tuple(input_shape)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "ensemble_size": self.ensemble_size}
