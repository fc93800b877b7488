"""How TensorFlow spends little time on the many small models of the tests."""

import functools

import keras


def compile_quickly():
    """Leaves out what takes longer than the steps of a small model.

    Graphs are not optimized. Keras's own optimizers have their slots before the first
    step, which else is traced a second time after making them; kzoo's, whose tests are
    about that too, make them inside.
    """
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    make = keras.Model.make_train_function

    @functools.wraps(make)
    def make_train_function(self, force=False):
        # A model that `fit` builds does not have all its weights yet.
        built = all(layer.built for layer in self._flatten_layers())
        if built and self.optimizer is not None and is_keras(self.optimizer):
            self.optimizer.build(self.trainable_variables)
        return make(self, force)

    keras.Model.make_train_function = make_train_function


def is_keras(optimizer):
    """Whether an optimizer, and one inside of it, is Keras's own."""
    inner = getattr(optimizer, "inner_optimizer", None)
    own = type(optimizer).__module__.split(".")[0] == "keras"
    return own and (inner is None or is_keras(inner))
