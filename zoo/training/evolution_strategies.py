"""Evolution strategies, a whole population in one pass by Flipout's signs."""

import contextlib
import copy
import math

import keras
import numpy as np
from keras import ops

from ...layers.ops.arguments import integer, positive
from ...layers.ops.random import draw_together, normal, nth_seed, random_sign
from .population import Population, by_device

SHAPINGS = ("centered_ranks", None)
GOLDEN = 0x9E3779B9


@keras.saving.register_keras_serializable(package="kzoo")
class EvolutionStrategies(keras.Model):
    """Trains a model without its gradients, by a population of perturbed copies.

    Member n of N has the weights W + ΔW_n, with ΔW_n ~ N(0, σ²) and the loss F_n.
    With u_n its utility,

        g = 1 / (N σ²) sum_n u_n ΔW_n

    estimates, for u_n = F_n, the gradient of the expected loss of a perturbed model,
    and goes to any Keras optimizer. The loss need not be differentiable. Members come
    in pairs W ± ΔW_n (antithetic), whose even orders cancel. By default u_n is the
    rank of F_n, from -1/2 to 1/2, so that no outlier counts for more.

    All kernels' perturbations are made of one base perturbation ΔŴ ~ N(0, σ²) and of
    signs s_n of the inputs and r_n of the outputs,

        ΔW_n = ΔŴ ∘ (s_n r_nᵀ),
        x_n (W + ΔW_n) = x_n W + ((x_n ∘ s_n) ΔŴ) ∘ r_n,
        sum_n u_n ΔW_n = ΔŴ ∘ (Sᵀ diag(u) R),

    so that the population is evaluated by two products in all, and the estimate is
    one more: no member's weights are ever formed. (Convolutions have one sign for a
    channel. Biases, which are small, get perturbations of their own.) Members of one
    base are uncorrelated, but share the magnitudes |ΔŴ|: as N grows, entry ij of the
    estimate comes down to the gradient times ΔŴ_ij² / σ², whose mean is 1, and no
    further. The steps of an optimizer average that out, and so do more bases.

    A model like any other around the one it trains: `compile`, `fit`, `evaluate`,
    `predict`, callbacks and `save` work; in `fit` all members see the same batch, and
    the loss and metrics shown are those of the model itself, W. (A member's loss is the
    mean of its rows' values, whatever the loss's reduction and weight.) For anything
    else that gives each member a number, such as an episode in an environment, `act`
    gives the members' outputs, as often as it takes, and `update` makes the step.
    Layers compute as in inference: without dropout, with batch statistics as they are.

    On several devices each has its own base perturbations and members: under
    `tf.distribute.MirroredStrategy` (make and compile this model in its scope), or
    `keras.distribution.DataParallel` on JAX. Of the same bases the members are the same
    on any number of devices.

    Reference: Salimans, Ho, Chen, Sidor, Sutskever, "Evolution Strategies as a Scalable
    Alternative to Reinforcement Learning", 2017. https://arxiv.org/abs/1703.03864
    Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent Weight
    Perturbations on Mini-Batches", 2018, section 3.3. https://arxiv.org/abs/1803.04386

    Args:
        model: A built Sequential or functional `keras.Model`, whose trained weights are
            those of dense, einsum and convolution layers. Freeze others.
        population: N.
        stddev: σ.
        antithetic: Whether members come in pairs of opposite perturbations.
        shaping: `"centered_ranks"`, or None for the losses themselves.
        bases: Number of base perturbations, which divides the number of members or
            pairs. Defaults to the number of devices.
        seed: An integer, for the same perturbations again.
        **kwargs: `keras.Model`'s arguments, such as `name`.

    Call arguments:
        inputs: As the model's.

    Input shape:
        The model's.

    Output shape:
        The model's.

    Raises:
        ValueError: If an argument is out of range, or the model is not as described;
            from `fit` if the loss is not one for one output.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.zoo import EvolutionStrategies
    >>> policy = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> strategy = EvolutionStrategies(policy, population=64, stddev=0.1, seed=0)
    >>> strategy.compile(keras.optimizers.Adam(0.1))
    >>> observations = np.ones((64, 4), "float32")  # one for each member
    >>> for _ in range(20):
    ...     actions = strategy.act(observations)
    ...     strategy.update(fitness=-((actions - [1.0, 2.0]) ** 2).sum(axis=1))
    >>> error = policy.predict(observations[:1], verbose=0) - [1.0, 2.0]
    >>> bool(abs(error).max() < 0.5)
    True
    """

    def __init__(
        self,
        model,
        population=256,
        stddev=0.02,
        *,
        antithetic=True,
        shaping="centered_ranks",
        bases=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if shaping not in SHAPINGS:
            raise ValueError(
                f"expected `shaping` to be one of {list(SHAPINGS)}. "
                f"Received: shaping={shaping!r}"
            )
        self.population = integer("population", population, 2)
        self.stddev, self.shaping = positive("stddev", stddev), shaping
        self.antithetic = bool(antithetic)
        self.bases = None if bases is None else integer("bases", bases)
        devices = _devices()
        self._count = self.bases or devices
        parts = self._count * (2 if self.antithetic else 1)
        if self._count % devices or self.population % parts:
            raise ValueError(
                f"expected `bases` to be a multiple of the {devices} device(s), and "
                "`population` one of `bases`, or of twice as many if members come in "
                f"pairs. Received: population={population}, antithetic={antithetic}, "
                f"bases={self._count}"
            )
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.model = model
        # The model of all members is no part of what is saved: it is made of layers
        # around this one's.
        self._members = _Untracked(Population(model))
        self._inner = _Untracked({})
        self.perturbation_seed = self.add_weight(
            name="perturbation_seed",
            shape=(2,),
            dtype=self.seed_generator.state.dtype,
            initializer="zeros",
            trainable=False,
        )
        self._perturb_anew()
        self.built = True

    def call(self, inputs):
        """Returns the model's outputs."""
        return self.model(inputs, training=False)

    def act(self, observations):
        """Returns the members' outputs, as arrays.

        The members stay the same until `update`. Those of a base lie one behind the
        other, and of these the second half are the opposites of the first.

        Args:
            observations: Member-major: of N rows or a multiple, the first are those
                of member 0. An array or a structure of arrays.

        Returns:
            The members' outputs, row for row.

        Raises:
            ValueError: If the rows do not split into members.
        """
        rows = [np.shape(x)[:1] for x in keras.tree.flatten(observations)]
        if len(set(rows)) != 1 or not rows[0] or rows[0][0] % self.population:
            raise ValueError(
                "expected arrays with as many rows for each member, a multiple of "
                f"{self.population} in all. Received: {sorted(set(sum(rows, ())))} rows"
            )
        inner = self._inner.value
        if "act" not in inner:
            with self._scope():
                inner["act"] = _Acting(self)
        return inner["act"].predict_on_batch(observations)

    def update(self, fitness):
        """Makes a step to where fitness is higher, and then new members.

        Args:
            fitness: A number for each member, `[N]`, in the order of `act`.

        Raises:
            ValueError: If they are not N finite numbers, or `compile` has given no
                optimizer.
        """
        if getattr(self, "optimizer", None) is None:
            raise ValueError(
                "expected `compile(optimizer)` before `update`. Received: no optimizer"
            )
        fitness = np.asarray(fitness, self.variable_dtype)
        if fitness.shape != (self.population,) or not np.isfinite(fitness).all():
            raise ValueError(
                f"expected `fitness` to be {self.population} finite numbers. "
                f"Received: {fitness!r}"
            )
        inner = self._inner.value
        if "update" not in inner or inner["update"].optimizer is not self.optimizer:
            with self._scope():
                inner["update"] = _Updating(self)
        inner["update"].train_on_batch(fitness)
        self._perturb_anew()

    def member_weights(self, n):
        """Returns the weights of member n, as `act` has them.

        Args:
            n: Integer, from 0 to N - 1.

        Returns:
            List of arrays, in the order of `self.trainable_variables`.

        Raises:
            ValueError: If there is no such member.
        """
        n = integer("n", n, 0)
        if n >= self.population:
            raise ValueError(f"expected `n` below {self.population}. Received: n={n}")
        # The sum over a population in which only this member counts.
        one = np.eye(self.population, dtype=self.variable_dtype)[n]
        noise = self._noise(self.perturbation_seed, 0, self._count)
        sums = self._sums(noise, ops.convert_to_tensor(one))
        return [
            ops.convert_to_numpy(v) + ops.convert_to_numpy(d)
            for v, d in zip(self.trainable_variables, sums, strict=True)
        ]

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        """The model's loss, with the estimate for its gradient in training."""
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if not training:
            return loss
        replica, replicas = _replica()
        count = self._count // replicas
        seed = self.seed_generator.next()
        noise = self._noise(seed, replica * count, count)
        losses = self._member_losses(x, y, sample_weight, noise)
        losses = ops.reshape(_of_all_replicas(losses), (self.population,))
        utilities = self._utilities(losses)
        utilities = _of_replica(utilities, replica, replicas)
        # Penalties of weights have gradients of their own. The distributed step sums
        # over the replicas.
        return (
            ops.stop_gradient(loss)
            + ops.cast(self._with_gradient(noise, utilities), loss.dtype) / replicas
            + ops.cast(self._penalties(), loss.dtype) / replicas
        )

    def _penalties(self):
        """0, with the gradient of the weights' penalties."""
        return sum(_zero(p) for p in self.losses)

    def _scope(self):
        """Where this model was made, in which its inner ones must be too."""
        if keras.backend.backend() == "tensorflow":
            return self.distribute_strategy.scope()
        return contextlib.nullcontext()

    def _perturb_anew(self):
        self.perturbation_seed.assign(self.seed_generator.next())

    def _noise(self, seed, first, count):
        """What is random of the members of some bases.

        Args:
            seed: Pair of integers.
            first: The first base, an integer or a scalar tensor.
            count: How many.

        Returns:
            For each perturbed layer ΔŴ `[bases, *kernel]`; and s, r and the bias's
            perturbations (or None), `[bases, members of each, ...]`.
        """
        seed = ops.cast(ops.convert_to_tensor(seed), "uint32")
        # As the replicas of `kzoo.layers.ops.random`.
        steps = [
            ops.cast(first + i, "uint32") * np.uint32(GOLDEN) for i in range(count)
        ]
        bases = [self._base(ops.stack([seed[0] + i, seed[1]])) for i in steps]
        return [
            [None if e[0] is None else by_device(ops.stack(e)) for e in of_layer]
            for of_layer in map(_transposed, _transposed(bases))
        ]

    def _base(self, seed):
        """For each perturbed layer, what `_noise` returns of one base."""
        members = self.population // self._count
        half = members // 2 if self.antithetic else members
        layers = self._perturbed_layers
        kernels = [x.plain.kernel.shape for x in layers]
        biases = [
            (half, *([0] if x.plain.bias is None else x.plain.bias.shape))
            for x in layers
        ]
        signs = [(half, *s) for x in layers for s in (x.signs.ins, x.signs.outs)]
        dtype = layers[0].plain.kernel.dtype
        numbers = draw_together(normal, kernels + biases, nth_seed(seed, 0), dtype)
        signs = draw_together(random_sign, signs, nth_seed(seed, 1), dtype)

        def pairs(x, sign):
            return ops.concatenate([x, sign * x]) if self.antithetic else x

        found = []
        for i, layer in enumerate(layers):
            bias = None
            if layer.plain.bias is not None:
                bias = pairs(self.stddev * numbers[len(layers) + i], -1)
            s, r = pairs(signs[2 * i], 1), pairs(signs[2 * i + 1], -1)
            found.append((self.stddev * numbers[i], s, r, bias))
        return found

    @property
    def _perturbed_layers(self):
        return self._members.value.perturbed

    def _acted(self, observations):
        """The members' outputs, of this replica's members."""
        replica, replicas = _replica()
        count = self._count // replicas

        def of_replica(x):
            return _of_replica(x, replica, replicas)

        noise = self._noise(self.perturbation_seed, replica * count, count)
        return self._members.value.outputs(
            keras.tree.map_structure(of_replica, observations), noise
        )

    def _updated(self, fitness):
        """The zero whose gradient is the estimate, of this replica's members."""
        replica, replicas = _replica()
        count = self._count // replicas
        utilities = _of_replica(self._utilities(-fitness), replica, replicas)
        noise = self._noise(self.perturbation_seed, replica * count, count)
        return (self._with_gradient(noise, utilities) + self._penalties()) / replicas

    def _member_losses(self, x, y, sample_weight, noise):
        """The loss of each member of the noise, all on the same batch."""
        members = math.prod(noise[0][1].shape[:2])

        def tile(x):
            return ops.tile(x, (members, *[1] * (len(x.shape) - 1)))

        def tiled(structure):
            return keras.tree.map_structure(tile, structure)

        outputs = self._members.value.outputs(tiled(x), noise)
        loss = _of_rows(self.loss)
        if loss is None or keras.tree.is_nested(outputs):
            raise ValueError(
                "expected one loss, for a model with one output. "
                f"Received: loss={self.loss!r}, outputs {outputs}"
            )
        weight = None if sample_weight is None else tile(sample_weight)
        values = loss(tiled(y), outputs, weight)
        if not len(values.shape):
            raise ValueError(
                "expected a loss with a value for each row. "
                f"Received: loss={self.loss!r}, which gives a scalar"
            )
        return ops.mean(ops.reshape(values, (members, -1)), axis=1)

    def _utilities(self, losses):
        """u, of which the estimate is the weighted sum."""
        count = losses.shape[0]
        if self.shaping is None:
            # A baseline of the same for all changes nothing for pairs. Without them it
            # is the mean of the others, so that the estimate's mean stays as it is.
            utilities = losses - ops.mean(losses)
            return utilities if self.antithetic else utilities * count / (count - 1)
        losses = ops.where(ops.isnan(losses), math.inf, losses)
        ordered = ops.sort(losses)
        # Equal losses share the mean of their ranks.
        ranks = ops.searchsorted(ordered, losses, side="left")
        ranks += ops.searchsorted(ordered, losses, side="right") - 1
        return ops.cast(ranks, losses.dtype) / (2 * (count - 1)) - 0.5

    def _sums(self, noise, weights):
        """sum_n w_n ΔW_n of every trained variable, in the model's order."""
        found = {}
        for layer, (perturbation, s, r, bias) in zip(
            self._perturbed_layers, noise, strict=True
        ):
            w = ops.cast(weights, perturbation.dtype)
            w = ops.reshape(w, s.shape[:2])
            signs = layer.signs.sum(w, s, r)
            found[id(layer.plain.kernel)] = ops.sum(perturbation * signs, axis=0)
            if bias is not None:
                found[id(layer.plain.bias)] = ops.tensordot(w, bias, axes=2)
        return [found[id(v)] for v in self.trainable_variables]

    def _with_gradient(self, noise, utilities):
        """0, whose gradient by the trained variables is the estimate g."""
        utilities = ops.stop_gradient(utilities)
        scale = 1 / (utilities.shape[0] * self.stddev**2)
        total = 0.0
        sums = self._sums(noise, utilities * scale)
        for variable, g in zip(self.trainable_variables, sums, strict=True):
            total += ops.sum(ops.stop_gradient(g) * _zero(variable))
        return total

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
        names = ("population", "stddev", "antithetic", "shaping", "bases", "seed")
        return {
            "name": self.name,
            "model": keras.saving.serialize_keras_object(self.model),
            **{name: getattr(self, name) for name in names},
        }

    @classmethod
    def from_config(cls, config):
        """Makes a model from what `get_config` returns."""
        model = keras.saving.deserialize_keras_object(config["model"])
        return cls(**{**config, "model": model})


class _Untracked:
    """Hides a value from Keras's tracking of what a layer has."""

    def __init__(self, value):
        self.value = value


class _Acting(keras.Model):
    """From observations to the members' outputs, as Keras compiles it."""

    def __init__(self, strategy):
        super().__init__(name="acting")
        self.strategy = strategy

    def call(self, inputs):
        return self.strategy._acted(inputs)


class _Updating(keras.Model):
    """From fitness to a step of the optimizer, as Keras compiles it."""

    def __init__(self, strategy):
        # Fitness is not rounded under mixed precision.
        super().__init__(name="updating", dtype=strategy.variable_dtype)
        self.strategy = strategy
        if not strategy.optimizer.built:
            strategy.optimizer.build(strategy.trainable_variables)
        self.compile(
            strategy.optimizer,
            jit_compile=strategy.jit_compile,
            run_eagerly=strategy.run_eagerly,
        )

    def call(self, inputs):
        return inputs

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        return self.strategy._updated(y_pred)


def _transposed(rows):
    return list(zip(*rows, strict=True))


def _zero(x):
    """0 with the gradient of x."""
    x = ops.convert_to_tensor(x)
    return x - ops.stop_gradient(x)


def _of_rows(loss):
    """A loss that gives a value a row, or None if there is not one loss."""
    if loss is None or isinstance(loss, (list, tuple, dict)):
        return None
    loss = keras.losses.get(loss)
    if isinstance(loss, keras.losses.Loss):
        loss = copy.copy(loss)
        loss.reduction = None
        return loss
    return _OfFunction(loss)


class _OfFunction(keras.losses.Loss):
    """The loss of a function of labels and predictions."""

    def __init__(self, function):
        super().__init__(name="of_function", reduction=None)
        self.function = function

    def call(self, y_true, y_pred):
        if y_pred.shape[-1] == 1 and len(y_true.shape) == len(y_pred.shape) - 1:
            y_true = ops.expand_dims(y_true, -1)
        return self.function(y_true, y_pred)


def _devices():
    """The number of devices that a step is spread over."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.distribute.get_strategy().num_replicas_in_sync
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    return mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)]


def _replica():
    """This replica's number, and how many there are: (0, 1) but in TensorFlow's."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            replica = tf.cast(context.replica_id_in_sync_group, "int32")
            return replica, context.num_replicas_in_sync
    return 0, 1


def _of_replica(x, replica, replicas):
    """A replica's share of the first axis."""
    if replicas == 1:
        return x
    rows = x.shape[0] // replicas if x.shape[0] else ops.shape(x)[0] // replicas
    return ops.take(x, replica * rows + ops.arange(rows), axis=0)


def _of_all_replicas(x):
    """The replicas' tensors, one after the other."""
    if _replica()[1] == 1:
        return x
    import tensorflow as tf

    return tf.distribute.get_replica_context().all_gather(x, axis=0)
