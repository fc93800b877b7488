"""K-FAC, an optimizer that divides gradients by a model's curvature."""

import warnings
import weakref
from types import SimpleNamespace

import keras
from keras import ops

from ...layers.ops.arguments import integer, is_number, positive, rate
from ...layers.ops.random import seed_pair
from ..lookahead.nesting import nested
from . import blocks  # noqa: F401 (They register themselves.)
from .adaptation import best_gamma, checked, lowest
from .attachment import build, observe_batches
from .curvature import (
    APPROXIMATIONS,
    average,
    divide,
    find_parts,
    of_refresh,
    refreshed,
)
from .measuring import every, measured
from .objective import Objective
from .state import all_finite, assign, change_where_due, tensors, where_due
from .terms import KINDS

SHARINGS = ("expand", "reduce")
Schedule = keras.optimizers.schedules.LearningRateSchedule


@keras.saving.register_keras_serializable(package="kzoo")
class KFAC(keras.optimizers.Optimizer):
    """K-FAC: natural gradients, from Kronecker factors of the curvature.

    For the matrix W of a layer, which multiplies rows a that end in 1, s = a W, the
    curvature of the loss h (its Fisher information, which is its generalized
    Gauss-Newton matrix) is approximated by a Kronecker product of two small matrices,

        F ≈ A ⊗ G,   A = E[aᵀ a],   G = E[gᵀ g],   g = ∂(-log p(y|x)) / ∂s,

    with labels y drawn from the distribution that the model predicts. The update is

        U = (A + π √λ I)⁻¹ ∇W (G + √λ / π I)⁻¹,   π² = (tr A / dim A) / (tr G / dim G)
        ν = min(1, √(c / (η² Σ Uᵀ∇h)))
        M ← μ M - η ν U,   W ← W + M

    with the `learning_rate` η, `damping` λ, `momentum` μ and `norm_constraint` c
    (without one ν is 1). A and G are averages over the batches k = 1, 2, ...:

        A ← ε A + (1 - ε) A_batch,   ε = min(1 - 1/k, `factor_decay`),

    so that the first batch's stand as they are.

    Give it the model, then `compile` and `fit` as ever:

        model.compile(optimizer=KFAC(model, learning_rate=0.01), loss=...)
        model.fit(...)

    It reads the likelihood from the loss: cross-entropies, categorical or binary, the
    mean squared error, or what `register_likelihood` has told it of. At a step that
    updates factors, which `factor_update_period` sets, the model is run once more, on
    the same batch, and differentiated by values that have no part in the model (see
    taps.py). The model's own gradients, batch statistics and random numbers are not
    touched by that; and what is done to gradients (loss scaling, clipping,
    accumulation, moving averages) does not touch the factors. Over batches whose
    gradients are accumulated the factors are averaged.

    The model has no weight or layer more than without. A saved model keeps the factors
    with the other state of its optimizer. A file cannot hold the tie between the two,
    so after loading or cloning one call makes training go on as if it had not stopped:

        model = keras.saving.load_model("model.keras")
        KFAC.resume(model)

    (Nor does a file hold the seeds of Keras's Dropout, which begins its masks anew.)

    Weights of layers without a `CurvatureBlock` are divided by a diagonal curvature,
    D + λ, estimated from the square of the sampled loss's gradient; which layers those
    are is printed once.

    What layers add to the loss, such as ℓ2 regularizers and all of `add_loss`, has its
    part in the gradient, and none in the curvature; `weight_decay` is apart from both,
    W ← W - η (weight decay) W. Polyak's average is Keras's `use_ema=True`.
    Factors with numbers that are not finite are left out, and counted in
    `skipped_updates`. Where a factor has no inverse, λ is made ten times as much for it
    until it has; where none helps the inverse before stays, which `skipped_inverses`
    counts. Both are in float32 whatever the dtype policy.

    Reference: Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored
    Approximate Curvature", 2015. https://arxiv.org/abs/1503.05671

    Args:
        model: The model it will train, built or not. (None for one that gets its model
            by `attach`.)
        learning_rate: η, a number, schedule or callable.
        damping: λ, above 0, a number or a schedule. Inverses, and what lag-one
            approximations have, see a new one when they are made next; EK-FAC and
            diagonals, which add it as they divide, at once.
        momentum: μ, from 0 to below 1, a number or a schedule.
        norm_constraint: c, above 0, a number or a schedule; None for no constraint.
        factor_decay: The largest ε, from 0 to below 1, a number or a schedule.
        factor_update_period: Updates from one measurement of the factors to the next.
        inverse_update_period: Updates from one inversion of the factors to the next;
            the first three updates have theirs too.
        subsample: k: the factors are measured on every k-th example of a batch. (Those
            of a convolution may cost many times what the convolution does.)
        fisher: `"sampled"` draws labels from the model. `"empirical"` takes the true
            ones, which is another matrix, and not a curvature. `"exact"` takes all
            labels there may be: it runs C copies of the batch through the model, with C
            the size of its output's last axis (of several outputs, their sum). (Layers
            that draw for each row, such as Dropout, draw others for each copy. Where
            several positions of an output depend on one row a, random signs tell them
            apart, so that the factors are exact in the mean only; and so is the
            diagonal of weights that have no block.)
        approximation: `"kronecker"`; `"ekfac"`, in which A and G give the basis only,
            and the curvature along it is measured from single examples' gradients;
            `"diagonal"`, of the weights as they are; or for recurrent layers one that
            knows how neighbouring steps are correlated, `"lag_one"`, which takes their
            covariance for symmetric, or `"lag_one_limit"`, which takes sequences for
            endless. (Other layers, and cells in stacks, have `"kronecker"` then.)
        sharing: For layers that are applied at many positions of an example. With
            `"expand"` every position is as an example of its own. `"reduce"` is for
            models that average over positions before the loss: a is averaged over
            them, and g summed. (Lag-one approximations are of every step.)
        adaptation: An `Adaptation`, which sets λ and the steps' size and momentum by
            what the model's loss on the batch does; `damping` is then λ at first, and
            `learning_rate` and `momentum` have no part. None for none.
        seed: An integer, for the same labels again, or None.
        name: The optimizer's name.
        **kwargs: Keras's arguments, such as `weight_decay`, `clipnorm`, `use_ema` and
            `gradient_accumulation_steps`.

    Raises:
        ValueError: If an argument is out of range, or given beside an `adaptation`
            that leaves it no part (norm constraint, weight decay, clipping, gradient
            accumulation, a schedule of the damping); when training, if the loss's
            likelihood is not known, or the optimizer has no model (see `resume`).

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.optimizers import KFAC
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> step = {"learning_rate": 1.0, "momentum": 0.0, "damping": 1e-6}
    >>> model.compile(KFAC(model, fisher="exact", **step), "mse")
    >>> x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    >>> y = x @ np.array([[1.0], [-2.0], [3.0]], "float32") + 4
    >>> loss = model.train_on_batch(x, y)  # One step solves linear regression.
    >>> print(model.evaluate(x, y, verbose=0) < 1e-3)
    True
    """

    def __init__(
        self,
        model,
        learning_rate=0.01,
        damping=0.01,
        momentum=0.9,
        norm_constraint=None,
        factor_decay=0.95,
        factor_update_period=1,
        inverse_update_period=10,
        subsample=1,
        fisher="sampled",
        approximation="kronecker",
        sharing="expand",
        adaptation=None,
        seed=None,
        name="KFAC",
        **kwargs,
    ):
        if is_number(learning_rate):
            learning_rate = float(learning_rate)
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        if isinstance(damping, Schedule):
            self._damping = damping
        else:
            self._damping = self._add_number("damping", positive("damping", damping))
        self.adaptation = checked(adaptation, damping, norm_constraint, kwargs)
        if adaptation and adaptation.gamma_interval:
            self._gamma = self._add_number("gamma", (damping + adaptation.l2) ** 0.5)
        if adaptation and adaptation.damping_interval:
            self._ratio = self._add_number("ratio", 0.0)
        self.momentum = _number_or_schedule(rate, "momentum", momentum)
        self.norm_constraint = None
        if norm_constraint is not None:
            self.norm_constraint = _number_or_schedule(
                positive, "norm_constraint", norm_constraint
            )
        self.factor_decay = _number_or_schedule(rate, "factor_decay", factor_decay)
        self.factor_update_period = integer(
            "factor_update_period", factor_update_period
        )
        self.inverse_update_period = integer(
            "inverse_update_period", inverse_update_period
        )
        self.subsample = integer("subsample", subsample)
        self.fisher = _one_of("fisher", fisher, KINDS)
        self.approximation = _one_of(
            "approximation", approximation, tuple(APPROXIMATIONS)
        )
        self.sharing = _one_of("sharing", sharing, SHARINGS)
        self.seed = seed
        # What is not for Keras to save, which walks through attributes.
        self._hidden = SimpleNamespace(
            model=None,
            seeds=keras.random.SeedGenerator(seed, name="seed"),
            parts=[],
            layout=None,
            objective=None,
            seen=False,
        )
        self._track_variable(self._hidden.seeds.state)
        self._updates = self._add_state("factor_updates", (), "int32")
        self._skipped = self._add_state("skipped_updates", (), "int32")
        self._failed = self._add_state("skipped_inverses", (), "int32")
        self._summed = self._add_state("summed_batches", (), "int32")
        self._curvature = []
        if model is not None:
            self.attach(model)

    # The model.

    def attach(self, model):
        """Gives the optimizer the model that it trains.

        Args:
            model: A Keras model.

        Returns:
            The optimizer.
        """
        if not isinstance(model, keras.Model):
            raise ValueError(f"expected a keras.Model. Received: model={model!r}")
        self._hidden.model = weakref.ref(model)
        observe_batches(model)
        if self.built:
            self._find_parts(self._trainable_variables)
            self._add_curvature()
        return self

    @classmethod
    def resume(cls, model):
        """Ties a model that has been loaded to its optimizer, with all its factors.

        Args:
            model: A compiled model whose optimizer is a KFAC, or has some inside, as
                that of `with_fast_weights` has two.

        Returns:
            That KFAC; of several, the last one.

        Raises:
            ValueError: If there is none, or it was saved with another model.
        """
        optimizer, found = getattr(model, "optimizer", None), None
        for part in nested(optimizer) if optimizer is not None else ():
            if isinstance(part, cls):
                found = part.attach(model)
        if found is None:
            raise ValueError(
                f"expected a model that is compiled with {cls.__name__}. Received: "
                f"optimizer={optimizer!r}"
            )
        return found

    @property
    def model(self):
        """The model it is attached to, or None."""
        return self._hidden.model and self._hidden.model()

    def observes(self, model):
        """Whether it is attached to the model."""
        return self.model is model

    # State.

    def build(self, variables):
        """Makes the momenta and the curvature's state.

        Args:
            variables: A list of the variables that will be trained.
        """
        if self.built:
            return
        variables = list(variables)
        super().build(variables)
        self._momentums = self.add_optimizer_variables(variables, "momentum")
        if self.model is not None:
            self._find_parts(variables)
        if self._hidden.layout is not None:
            self._add_curvature()

    def _find_parts(self, variables):
        """Finds the model's blocks, and the weights that have none."""
        known = {self._var_key(variable) for variable in self.model.variables}
        others = [v.path for v in variables if self._var_key(v) not in known]
        if others:
            raise ValueError(
                "expected to train the model that the optimizer was given, "
                f"{self.model.name}. Received weights of another: {others}"
            )
        parts = find_parts(
            self.model,
            variables,
            self._var_key,
            self.approximation,
            self.sharing,
            accumulates=bool(self.gradient_accumulation_steps),
        )
        layout = [entry for part in parts for entry in part.layout()]
        shapes = [entry[1:] for entry in self._hidden.layout or layout]
        if shapes != [entry[1:] for entry in layout]:
            raise ValueError(
                "expected the model that the optimizer was saved with, whose curvature "
                f"is {self._hidden.layout}. Received: {self.model.name}, with {layout}"
            )
        self._hidden.parts, self._hidden.layout = parts, layout

    def _add_curvature(self):
        """Makes the variables of the layout, unless they have been made."""
        if not self._curvature:
            self._curvature = [self._add_state(*e) for e in self._hidden.layout]
        state = iter(self._curvature)
        for part in self._hidden.parts:
            part.take(state)

    def _add_number(self, name, value):
        return self.add_variable(
            (),
            keras.initializers.Constant(value),
            "float32",
            aggregation="only_first_replica",
            name=name,
        )

    def _add_state(self, name, shape, dtype):
        # Each replica sees its own part of a batch: factors are the mean of theirs.
        aggregation = "mean" if "float" in dtype else "only_first_replica"
        return self.add_variable(
            tuple(shape), "zeros", dtype, aggregation=aggregation, name=name
        )

    # The curvature of batches.

    def observe(self, x, y=None, sample_weight=None, due=None):
        """Measures the factors on a batch, if an update of them is due.

        `fit` and `train_on_batch` call it before every step; call it in training loops
        of your own.

        Args:
            x: What the model is given.
            y: Labels, which only `fisher="empirical"` reads.
            sample_weight: Weights of the examples, as in `fit`.
            due: True to measure whether an update is due or not.
        """
        if not self.built:
            self._build_all(x)
        self._hidden.seen = True
        if self.adaptation and due is None:
            batch = keras.tree.map_structure(
                lambda t: None if t is None else ops.convert_to_tensor(t),
                (x, y, sample_weight),
            )
            self._hidden.objective = Objective(self.model, *batch)
        seed = seed_pair(self._hidden.seeds)
        parts = self._hidden.parts
        if self.gradient_accumulation_steps:
            kept = [v for part in parts for v in part.sums]
            counts = [self._summed, self._skipped]
        else:
            kept = [v for part in parts for v in part.factors]
            counts = [self._updates, self._skipped]
        old = tensors([*counts, *kept])
        replica = _replica_context()
        replicas = replica.num_replicas_in_sync if replica else 1

        def measure():
            data, fraction = every((x, y, sample_weight), self.subsample)
            # A sum over examples is one over those of all replicas.
            fraction = fraction / replicas
            batch = measured(self.model, parts, self.fisher, data, seed, fraction)
            return self._add_batch(batch, *old)

        due = due or self._due(self.factor_update_period)
        assign([*counts, *kept], where_due(due, measure, old))

    def burn_in(self, batches):
        """Measures the factors on batches before training, which changes no weight.

        In the average of the factors they count as the first batches.

        Args:
            batches: Iterable of what `fit` takes: `x`, `(x, y)` or `(x, y,
                sample_weight)`, such as a part of a dataset, `dataset.take(10)`.

        Raises:
            ValueError: If the optimizer has no model, or one that is not compiled.
        """
        self._check_model()
        for batch in batches:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
            self.observe(x, y, sample_weight, due=True)
            if self.gradient_accumulation_steps:
                self._average_sums()

    def _build_all(self, x):
        """Builds the model, and what it is compiled with."""
        self._check_model()
        if getattr(self.model, "optimizer", None) is None:
            raise ValueError(
                "expected a model that is compiled, of whose loss the factors are. "
                f"Received: {self.model.name}, which is not"
            )
        build(self.model, x)
        self.build(self.model.trainable_variables)  # Trained in a loop of one's own.

    def _check_model(self):
        if self.model is None:
            raise ValueError(
                "expected a KFAC that knows its model: call KFAC.resume(model) after "
                "loading or cloning one. Received: a KFAC without a model"
            )

    def forget(self):
        """Forgets the batch, which is kept from `observe` to the update."""
        self._hidden.objective = None

    def _add_batch(self, batch, count, skipped, *old):
        """Returns the counts and factors after a batch."""
        finite = all_finite(batch)
        count_now = count + ops.cast(finite, count.dtype)
        if self.gradient_accumulation_steps:
            new = [o + b for o, b in zip(old, batch, strict=True)]
        else:
            new = average(count_now, old, batch, self._value(self.factor_decay))
        new = [ops.where(finite, n, o) for n, o in zip(new, old, strict=True)]
        return [count_now, skipped + 1 - ops.cast(finite, skipped.dtype), *new]

    def _average_sums(self):
        """Averages in what the batches have summed whose gradients accumulated."""
        parts = self._hidden.parts
        factors = [v for part in parts for v in part.factors]
        sums = [v for part in parts for v in part.sums]
        count = ops.convert_to_tensor(self._summed)
        some = count > 0
        k = self._updates + ops.cast(some, "int32")
        mean = [s / ops.cast(ops.maximum(count, 1), s.dtype) for s in tensors(sums)]
        old = tensors(factors)
        new = average(k, old, mean, self._value(self.factor_decay))
        new = [ops.where(some, n, o) for n, o in zip(new, old, strict=True)]
        assign([self._updates, *factors], [k, *new])
        assign([self._summed, *sums], [0, *map(ops.zeros_like, mean)])

    def _refresh(self, also=False):
        """Makes of the factors what divides gradients, if that is due, or `also`."""
        parts, damping = self._hidden.parts, self.inverse_damping

        def changed():
            found, failed = refreshed(parts, damping)
            return [ops.convert_to_tensor(self._failed) + failed, *found]

        due = self._due(self.inverse_update_period, first=3)
        due = due if also is False else ops.logical_or(due, also)
        state = of_refresh(parts)
        if state:
            change_where_due(due, [self._failed, *state], changed)

    def _due(self, period, first=0):
        """Whether something is due that comes after so many updates; True if always."""
        if period == 1:
            return True
        iterations = ops.convert_to_tensor(self.iterations)
        due = ops.equal(ops.mod(iterations, period), 0)
        return ops.logical_or(due, iterations < first) if first else due

    # Updates.

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self._check_model()
        if not self._hidden.seen:
            warnings.warn(
                f"KFAC has seen no batch of {self.model.name}, the model that it was "
                "given: train that one by `fit` or `train_on_batch`, or call `observe` "
                "before each update."
            )
        grads, replicas = _reduced(grads)
        if self.gradient_accumulation_steps:
            self._average_sums()
        if self.adaptation:
            if replicas > 1:
                raise ValueError(
                    "expected one replica with an adaptation. Received: "
                    f"{replicas} replicas"
                )
            steps = self._adapted(grads, trainable_variables)
            super()._backend_update_step(steps, trainable_variables, 1.0)
            return
        self._refresh()
        steps = self._divide(grads, trainable_variables, self.inverse_damping)
        size = self._norm_scale(steps, grads, learning_rate) / replicas
        steps = [ops.cast(size, step.dtype) * step for step in steps]
        super()._backend_update_step(steps, trainable_variables, learning_rate)

    def _adapted(self, grads, variables):
        """Returns δ, and changes γ and λ."""
        objective, adaptation = self._hidden.objective, self.adaptation
        self.forget()
        if objective is None:
            raise ValueError(
                "expected to see the batch by `observe` before its gradients, as an "
                "adaptation reads the loss. Received: gradients alone"
            )
        known = []
        if adaptation.momentum:
            slots = [self._momentums[self._get_variable_index(v)] for v in variables]
            known.append(tensors(slots))
        damping = self.damping + adaptation.l2

        def curvature(directions):
            return objective.curvature(variables, directions, adaptation.subsample)

        def best(inverse_damping, states=None):
            steps = self._divide(grads, variables, inverse_damping, states)
            directions = [[-step for step in steps], *known]
            return lowest(grads, directions, curvature, damping)

        def expected_of(gamma):
            damping = ops.square(gamma)
            return best(damping, [p.refreshed(damping) for p in self._hidden.parts])[1]

        due = False
        if adaptation.gamma_interval:
            due, gammas = self._due(adaptation.gamma_interval), adaptation.gammas
            change_where_due(
                due,
                [self._gamma],
                lambda: [best_gamma(gammas(self._gamma), expected_of)],
            )
        self._refresh(due)
        change, expected = best(self.inverse_damping)

        def adapted():
            gain = objective.loss(variables, change)
            gain = gain - objective.loss(variables, [0 * delta for delta in change])
            ratio = ops.cast(ops.cast(gain, expected.dtype) / expected, "float32")
            return [adaptation.damping(self.damping, ratio), ratio]

        if adaptation.damping_interval:
            due = self._due(adaptation.damping_interval)
            change_where_due(due, [self._damping, self._ratio], adapted)
        return change

    def _divide(self, grads, variables, damping, states=None):
        """Returns U; with `states` in place of the parts' own."""
        parts = self._hidden.parts
        return divide(parts, grads, variables, self._var_key, damping, states)

    def _norm_scale(self, steps, grads, learning_rate):
        """Returns ν, which bounds η² Uᵀ F U, for which stands η² Uᵀ ∇h."""
        if self.norm_constraint is None:
            return 1.0
        dtype = keras.backend.result_type(*[step.dtype for step in steps])
        square = sum(
            ops.sum(ops.cast(step, dtype) * ops.cast(g, dtype))
            for step, g in zip(steps, grads, strict=True)
        ) * ops.square(ops.cast(learning_rate, dtype))
        c = ops.cast(self._value(self.norm_constraint), square.dtype)
        return ops.sqrt(ops.minimum(1.0, c / ops.maximum(square, c * 1e-12)))

    def update_step(self, gradient, variable, learning_rate):
        """Moves a variable by M ← μ M - η U; with an adaptation, by M ← δ.

        Args:
            gradient: U, or δ.
            variable: The variable.
            learning_rate: η.
        """
        m = self._momentums[self._get_variable_index(variable)]
        step = ops.cast(gradient, m.dtype)
        if not self.adaptation:
            mu = ops.cast(self._value(self.momentum), m.dtype)
            step = mu * m - ops.cast(learning_rate, m.dtype) * step
        self.assign(m, step)
        self.assign_add(variable, ops.cast(m, variable.dtype))

    # Arguments.

    def _value(self, argument):
        """The value at this step of a number, variable or schedule."""
        return argument(self._iterations) if callable(argument) else argument

    @property
    def damping(self):
        """λ; assignable if it is no schedule."""
        return self._value(self._damping)

    @damping.setter
    def damping(self, damping):
        if isinstance(self._damping, Schedule):
            raise TypeError("a damping that is a schedule cannot be assigned to")
        if ops.is_tensor(damping):  # Such as a multiple of what it was.
            damping = float(ops.convert_to_numpy(damping))
        self._damping.assign(positive("damping", damping))

    @property
    def inverse_damping(self):
        """What stands for λ in the inverses: with an adaptation γ², or λ + η."""
        if not self.adaptation:
            return self._value(self._damping)
        if self.adaptation.gamma_interval:
            return ops.square(self._gamma)
        return self._damping + self.adaptation.l2

    @property
    def gamma(self):
        """γ of an adaptation that searches for it, or None."""
        return getattr(self, "_gamma", None)

    @property
    def ratio(self):
        """ρ when an adaptation last used it, 0 before; None if none does."""
        return getattr(self, "_ratio", None)

    @property
    def last_updates(self):
        """What was added last to the weights of each part, by its first one's path."""
        return {
            part.variables[0].path: [
                self._momentums[self._get_variable_index(v)] for v in part.variables
            ]
            for part in self._hidden.parts
            if self.built
        }

    @property
    def factors(self):
        """The averaged factors, by the path of the first weight that they are of."""
        return {
            part.variables[0].path: dict(
                zip(part.approximation.factors, part.factors, strict=True)
            )
            for part in self._hidden.parts
            if self.built
        }

    @property
    def skipped_updates(self):
        """How many batches were left out whose factors were not finite."""
        return int(self._skipped.numpy())

    @property
    def skipped_inverses(self):
        """How often what is made of a block's factors was not finite, and not taken."""
        return int(self._failed.numpy())

    def get_config(self):
        """Returns the constructor's arguments but the model, and the state's layout."""
        arguments = {
            "damping": self._damping,
            "momentum": self.momentum,
            "norm_constraint": self.norm_constraint,
            "factor_decay": self.factor_decay,
        }
        for name, value in arguments.items():
            if isinstance(value, Schedule):
                arguments[name] = keras.optimizers.schedules.serialize(value)
            elif value is not None:
                arguments[name] = float(value)
        return {
            **super().get_config(),
            **arguments,
            "model": None,
            "factor_update_period": self.factor_update_period,
            "inverse_update_period": self.inverse_update_period,
            "subsample": self.subsample,
            "fisher": self.fisher,
            "approximation": self.approximation,
            "sharing": self.sharing,
            "adaptation": keras.saving.serialize_keras_object(self.adaptation),
            "seed": self.seed,
            "layout": self._hidden.layout,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes an optimizer, without its model, from what `get_config` returns."""
        config = dict(config)
        layout = config.pop("layout", None)
        for name, value in config.items():
            if isinstance(value, dict):
                config[name] = keras.saving.deserialize_keras_object(
                    value, custom_objects=custom_objects
                )
        optimizer = cls(**config)
        optimizer._hidden.layout = layout
        return optimizer


def _replica_context():
    """TensorFlow's context in one of several replicas, or None."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            return context
    return None


def _reduced(grads):
    """Returns gradients summed over TensorFlow's replicas, and how many there are."""
    replica = _replica_context()
    if replica is None:
        return grads, 1
    return replica.all_reduce("SUM", list(grads)), replica.num_replicas_in_sync


def _number_or_schedule(check, name, value):
    return value if isinstance(value, Schedule) else check(name, value)


def _one_of(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"expected `{name}` to be one of {choices}. Received: {name}={value!r}"
        )
    return value
