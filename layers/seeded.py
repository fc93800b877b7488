"""A layer with random numbers of its own."""

import keras

from .ops.arguments import is_integer


class SeededLayer(keras.layers.Layer):
    """A layer that takes a `seed`, and keeps the state of what it draws in its files.

    Args:
        seed: An integer, for the same draws again, or None.
        **kwargs: `keras.layers.Layer`'s arguments.
    """

    def __init__(self, *, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.seed = int(seed) if is_integer(seed) else seed
        self.seed_generator = keras.random.SeedGenerator(self.seed)

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
        """Returns the constructor's arguments."""
        return {**super().get_config(), "seed": self.seed}
