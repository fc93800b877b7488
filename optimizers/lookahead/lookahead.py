"""Lookahead: k steps forward, one step back."""

import contextlib
import functools
import numbers
from types import SimpleNamespace

import keras
from keras import ops

from ...layers.ops.arguments import integer
from .conditional import change_if, eager_scope
from .nesting import initial_value, momenta, nested, parts, rules, slots

INNER_STATES = ("maintain", "reset", "pullback")


@keras.saving.register_keras_serializable(package="kzoo")
class Lookahead(keras.optimizers.Optimizer):
    """Lookahead around any Keras optimizer: k steps forward, one step back.

    The inner optimizer A moves the fast weights θ, which are the model's variables.
    After every k of its updates the slow weights φ go a part α of the way to where θ
    has got, and θ starts again from there:

        θ_{t,0} = φ_{t-1}
        θ_{t,i} = θ_{t,i-1} + A(L, θ_{t,i-1}),   i = 1, ..., k
        φ_t     = φ_{t-1} + α (θ_{t,k} - φ_{t-1}),   θ ← φ_t

    With k the `sync_period` and α the `slow_step_size`. φ starts from the variables,
    as they are when the first update begins. Right after a sync θ and φ are equal.

    At a sync, what becomes of the inner optimizer's state is set by `inner_state`:

    - `"maintain"`: it is left alone.
    - `"reset"`: A starts anew. Its slots (momenta, accumulators, all variables that
      its rule made for itself) get the values they had when they were made, which
      are not always zero, and the number of the step that its rule reads, for the
      correction of bias, is counted from the sync. Nothing else is: `iterations`,
      learning-rate schedules, its moving average of the weights and the counting of
      the k updates go on.
    - `"pullback"`: A's momenta m are interpolated as the weights are, with their
      values at the sync before: m ← m' + α (m - m'), and m' ← m. Momenta are the
      slots that A names `momentum` (SGD, RMSprop, Adam and what comes of it, Lion,
      Muon, ...), and FTRL's `linear`. Averages of squares are left alone, so for an
      optimizer without momenta (Adagrad, Adadelta, Adafactor) this is `"maintain"`.

    FTRL computes the weights from its slots and hardly sees a change of theirs: use
    `"pullback"` with it.

    The learning rate, gradient clipping, weight decay, gradient accumulation, moving
    averages and loss scaling belong to the inner optimizer. `learning_rate` and
    `iterations` read and write through to it, so that callbacks work. Only its real
    updates count: not the calls in which gradients accumulate, nor steps that a loss
    scale skips. A sync comes when `iterations` is a multiple of k. Under
    `mixed_float16`, Keras puts a `LossScaleOptimizer` around this optimizer by
    itself; one inside it works where Keras is told not to
    (`compile(auto_scale_loss=False)`). Another `Lookahead` inside restarts from the
    weights of the outer one's sync.

    At the end of `fit` the model has the fast weights (with the inner `use_ema`, the
    moving average of the fast weights, as without Lookahead). To evaluate, predict,
    save or export the slow ones:

        with optimizer.slow_weights():
            model.evaluate(x, y)

    and for the validation within `fit`, `kzoo.optimizers.SwapSlowWeights`. Weights
    that are set by hand between updates (`load_weights`) are fast weights, which the
    next sync averages with φ; before the first update, they are φ too.

    On JAX a compiled update cannot be differentiated in reverse mode: whether a sync
    is due is decided by a loop.

    φ and the momenta m' are kept in float32 for variables of half precision.
    Variables that their gradient overwrites (float8 scales) are not averaged. A
    variable's constraint is applied to φ at a sync. All state is in `variables`, so
    that a model that is saved within a cycle and loaded goes on as if it had not
    stopped. (`load_weights` restores an optimizer that is built, and warns that it
    skips another, as Keras's own: call `optimizer.build(model.trainable_variables)`.)

    Takes `tfa.optimizers.Lookahead`'s arguments, with its defaults. What differs:

    - `clipnorm` and the like are refused: give them to the inner optimizer;
    - the inner optimizer is `inner_optimizer`, not `_optimizer`.

    Reference: Zhang, Lucas, Hinton, Ba, "Lookahead Optimizer: k steps forward, 1 step
    back", 2019. https://arxiv.org/abs/1907.08610

    Args:
        optimizer: A, a `keras.optimizers.Optimizer`, or the name or config of one.
        sync_period: k, a positive integer: the updates between two syncs.
        slow_step_size: α, from 0 (φ never moves) to 1 (the inner optimizer alone).
        name: The optimizer's name.
        inner_state: `"maintain"`, `"reset"` or `"pullback"`.
        **kwargs: None. Keras's arguments belong to the inner optimizer.

    Raises:
        ValueError: If an argument is out of range; if a LossScaleOptimizer is put
            around a Lookahead that has one inside; when it is built, if
            `inner_state="reset"` is to restore values that it cannot know, or
            if the parts of a MultiOptimizer accumulate different numbers of
            gradients.

    Example:

    >>> import keras
    >>> from kzoo.optimizers import Lookahead
    >>> w = keras.Variable([1.0])
    >>> optimizer = Lookahead(keras.optimizers.SGD(0.1), sync_period=2)
    >>> for _ in range(2):
    ...     optimizer.apply([keras.ops.ones(1)], [w])
    >>> print(round(float(w.numpy()[0]), 4))  # Half of the way from 1 to 0.8.
    0.9
    """

    def __init__(
        self,
        optimizer,
        sync_period=6,
        slow_step_size=0.5,
        name="Lookahead",
        inner_state="maintain",
        **kwargs,
    ):
        if kwargs:
            raise ValueError(
                "expected the arguments of Lookahead only; what Keras's optimizers "
                f"take belongs to the inner optimizer. Received: {kwargs}"
            )
        sync_period = integer("sync_period", sync_period)
        if not isinstance(slow_step_size, numbers.Real) or not 0 <= slow_step_size <= 1:
            raise ValueError(
                "expected slow_step_size to be a number from 0 to 1. "
                f"Received: slow_step_size={slow_step_size!r}"
            )
        if inner_state not in INNER_STATES:
            raise ValueError(
                f"expected inner_state to be one of {INNER_STATES}. "
                f"Received: inner_state={inner_state!r}"
            )
        inner = _get_optimizer(optimizer)
        super().__init__(learning_rate=self._inner_learning_rate, name=name)
        self.inner_optimizer = inner
        self.sync_period = sync_period
        self.slow_step_size = float(slow_step_size)
        self.inner_state = inner_state
        self._swap = None

    def build(self, variables):
        """Makes the inner optimizer's state and the slow weights.

        Args:
            variables: A list of the variables that will be trained.
        """
        if self.built:
            return
        variables = list(variables)
        with eager_scope() as eager:
            resets = self._build_inner(variables, eager)
            super().build(variables)
            self._slow = self._add_slow(variables)
            pairs = list(zip(variables, self._slow, strict=True))
            self._slow_momenta = []
            if self.inner_state == "pullback":
                fast = [
                    m for part in nested(self.inner_optimizer) for m in momenta(part)
                ]
                self._slow_momenta = self._add_slow(fast)
                pairs += zip(fast, self._slow_momenta, strict=True)
            pairs = [(fast, slow) for fast, slow in pairs if slow is not None]
            # Lists of variables of others: Keras would take them for state of ours if
            # they were attributes.
            self._changes = SimpleNamespace(
                start=[((slow,), (fast,), _start) for fast, slow in pairs]
                + [
                    ((rule._iterations,), (), _wait)
                    for rule in rules(self.inner_optimizer)
                ],
                sync=[self._sync_of(fast, slow) for fast, slow in pairs] + resets,
            )
            for fast, slow in pairs if eager else ():
                slow.assign(ops.copy(fast))  # On JAX two must not share a buffer.

    def _build_inner(self, variables, eager):
        """Builds the inner optimizer; returns the changes that reset its slots."""
        inner, reset = self.inner_optimizer, self.inner_state == "reset"
        if reset and (inner.built or not eager):
            raise ValueError(
                'inner_state="reset" expects an inner optimizer that is not built yet, '
                "and to be built outside of a compiled function: call "
                "`optimizer.build(model.trainable_variables)` before the first step. "
                f"Received: {inner.name}, built={inner.built}"
            )
        if not inner.built:
            inner.build(variables)
        steps = {rule.gradient_accumulation_steps or 1 for rule in rules(inner)}
        if len(steps) > 1:
            raise ValueError(
                "expected all parts of the inner optimizer to accumulate gradients "
                f"over the same number of steps. Received: {sorted(steps)}"
            )
        if not reset:
            return []
        for rule in rules(inner):
            # What updates the variables, and nothing else, counts its steps anew.
            vars(rule)["_backend_update_step"] = functools.partial(
                self._update_since_sync,
                rule,
                rule._iterations,
                rule._backend_update_step,
            )
        return [
            ((slot,), (), functools.partial(_fill, value=initial_value(slot)))
            for part in nested(inner)
            for slot in slots(part)
            if not any(slot is copy for copy in self._copies_in(part))
        ]

    def _add_slow(self, variables):
        """Adds a variable for each one that is averaged; None for the others."""
        return [
            self.add_variable_from_reference(variable, name="slow")
            if _is_float(variable)
            and not self._overwrite_variable_with_gradient(variable)
            else None
            for variable in variables
        ]

    def add_variable(self, shape, initializer="zeros", dtype=None, **kwargs):
        """Adds a variable, in float32 where half precision is asked for."""
        if dtype is not None:
            dtype = keras.backend.standardize_dtype(dtype)
        if dtype in ("float16", "bfloat16"):
            dtype = "float32"
        return super().add_variable(shape, initializer, dtype, **kwargs)

    def _sync_of(self, fast, slow):
        """The change at a sync of a pair, and of what restarts from the weights."""
        constraint = getattr(fast, "constraint", None)
        followers = []
        for part in nested(self.inner_optimizer):
            index = part._trainable_variables_indices.get(self._var_key(fast))
            if index is not None and self._copies_in(part):
                followers.append(self._copies_in(part)[index])

        def sync(slow, fast, *followers):
            value = self._interpolate(slow, ops.cast(fast, slow.dtype))
            if constraint is not None:
                value = constraint(value)
            return [value] * (2 + len(followers))

        return (slow, fast, *followers), (), sync

    def _copies_in(self, part):
        """The variables, one a weight, in which a part of A copies the weights."""
        if isinstance(part, Lookahead):
            return part._slow
        if self.inner_state == "reset" and isinstance(
            part, keras.optimizers.ScheduleFreeAdamW
        ):
            return part._momentums  # The iterates z.
        return []

    def _interpolate(self, slow, fast):
        # φ + α(θ - φ), from the nearer end: exact for α = 0, for α = 1 and for θ = φ.
        alpha = self.slow_step_size
        if alpha < 0.5:
            return slow + alpha * (fast - slow)
        return fast - (1 - alpha) * (fast - slow)

    @property
    def variables(self):
        """The counter, the slow weights and the inner optimizer's variables."""
        return self._variables + self.inner_optimizer.variables

    @property
    def slow_variables(self):
        """φ: a variable for each one that is trained, None where it is not averaged."""
        return list(self._slow) if self.built else []

    def set_weights(self, weights):
        """Sets the values of `variables`.

        Args:
            weights: A list of arrays, one for each variable.
        """
        expected = [tuple(variable.shape) for variable in self.variables]
        received = [tuple(ops.convert_to_tensor(w).shape) for w in weights]
        if not self.built or received != expected:
            raise ValueError(
                f"expected an optimizer that is built, and arrays of shapes {expected}."
                f" Received: built={self.built}, shapes {received}"
            )
        for variable, weight in zip(self.variables, weights, strict=True):
            variable.assign(weight)

    # Updates.

    def apply(self, grads, trainable_variables=None):
        """Makes one update of the inner optimizer, and a sync when it is due.

        Args:
            grads: A list of gradients, or None where there is none.
            trainable_variables: Their variables. Defaults to all it was built with.
        """
        grads = list(grads)
        if not grads:
            return
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    "expected variables, or an optimizer that is built: call "
                    "`optimizer.build(trainable_variables)` first. "
                    f"Received: {len(grads)} gradients, trainable_variables=None"
                )
            trainable_variables = self._trainable_variables
        trainable_variables = list(trainable_variables)
        if len(grads) != len(trainable_variables):
            raise ValueError(
                "expected a gradient for each variable. Received: "
                f"{len(grads)} gradients, {len(trainable_variables)} variables"
            )
        self.build(trainable_variables)
        self._check_variables_are_known(trainable_variables)

        rule = rules(self.inner_optimizer)[0]
        before = ops.copy(rule.iterations)
        # θ_{1,0} = φ_0, whatever has been loaded into the model since `build`.
        self._change_if(ops.equal(self._iterations, 0), self._changes.start)
        self._apply_inner(grads, trainable_variables)
        # It may only have accumulated gradients, or found a loss scale too large.
        updated = ops.not_equal(rule.iterations, before)
        self._iterations.assign_add(ops.cast(updated, self._iterations.dtype))
        due = ops.equal(ops.mod(rule.iterations, self.sync_period), 0)
        # The weights of a layer that was frozen since `build` have no part in the sync.
        frozen = {id(v) for v in self._trainable_variables}
        frozen -= {id(v) for v in trainable_variables}
        sync = [c for c in self._changes.sync if not frozen & {id(v) for v in c[0]}]
        self._change_if(ops.logical_and(updated, due), sync)

    def _change_if(self, predicate, changes):
        strategy = getattr(self, "_distribution_strategy", None)  # TensorFlow's.
        change_if(predicate, changes, strategy)

    def _apply_inner(self, grads, trainable_variables):
        inner = self.inner_optimizer
        loss_scaled = isinstance(inner, keras.optimizers.LossScaleOptimizer)
        if not loss_scaled or keras.backend.backend() == "tensorflow":
            inner.apply(grads, trainable_variables)
            return
        # On JAX its `apply` assigns within a conditional, from where no value gets out.
        given = {id(v): g for g, v in zip(grads, trainable_variables, strict=True)}
        values, state = inner.stateless_apply(
            [v.value for v in inner.variables],
            [given.get(id(v)) for v in self._trainable_variables],
            [v.value for v in self._trainable_variables],
        )
        changed = self._trainable_variables + inner.variables
        for variable, value in zip(changed, [*values, *state], strict=True):
            variable.assign(value)

    def _update_since_sync(self, rule, iterations, update_step, *args):
        """Runs a rule's update, with its steps counted from the last sync."""
        # A sync comes when the updates are a multiple of k, so the remainder counts
        # those since. A Lookahead around this one may have counted fewer.
        period = self.sync_period * (rule.gradient_accumulation_steps or 1)
        since = ops.minimum(rule._iterations, ops.mod(iterations, period))
        vars(rule)["_iterations"] = since
        try:
            return update_step(*args)
        finally:
            # Not what stood there before: MirroredStrategy interleaves its replicas.
            vars(rule)["_iterations"] = iterations

    # What belongs to the inner optimizer.

    def _inner_learning_rate(self):
        return self.inner_optimizer.learning_rate

    @property
    def learning_rate(self):
        """The inner optimizer's learning rate; assignable if that is."""
        return self._inner_learning_rate()

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        """The number of the inner optimizer's real updates."""
        return self.inner_optimizer.iterations

    @property
    def loss_scale_factor(self):
        """What the inner optimizer scales the loss by, or None."""
        inner = getattr(self, "inner_optimizer", None)
        if isinstance(inner, keras.optimizers.LossScaleOptimizer):
            return inner.dynamic_scale if inner.built else inner.initial_scale
        return getattr(inner, "loss_scale_factor", None)

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor):
        if not hasattr(self, "inner_optimizer"):
            return  # Keras's constructor sets it first.
        # Whoever sets it scales the loss himself, in place of what is inside.
        scaling = keras.optimizers.LossScaleOptimizer
        if any(isinstance(part, scaling) for part in nested(self.inner_optimizer)):
            raise ValueError(
                "expected one loss scale, as gradients would be divided by each. Take "
                "the inner LossScaleOptimizer away (under mixed_float16 Keras puts one "
                "around Lookahead), or compile with auto_scale_loss=False. Received: "
                f"an optimizer around {self.name}, a LossScaleOptimizer inside of it"
            )
        self.inner_optimizer.loss_scale_factor = factor

    def scale_loss(self, loss):
        """Scales the loss as the inner optimizer asks for."""
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Excludes variables from the inner optimizer's weight decay."""
        for part in nested(self.inner_optimizer):
            if not parts(part):
                part.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list):
        """Ends training: the fast weights stay, or the inner moving average of them."""
        self._restore_fast_weights()
        self.inner_optimizer.finalize_variable_values(var_list)

    # Evaluation.

    @contextlib.contextmanager
    def slow_weights(self):
        """A context in which the model's variables have the values of φ.

        The fast weights come back at its end, whatever happens in it: train outside.
        A model that is saved in it has φ for its weights.
        """
        swap = self._swap_weights()
        try:
            yield
        finally:
            swap()

    def _swap_weights(self):
        """Puts φ in place of θ; returns a function that puts θ back."""
        if not self.built:
            return lambda: None
        updates = int(ops.convert_to_numpy(self._iterations))
        pairs = zip(self._trainable_variables, self._slow, strict=True)
        # Before the first update θ is φ; φ of a layer that is frozen now is an old one.
        pairs = [
            (v, slow)
            for v, slow in pairs
            if slow is not None and updates and v.trainable
        ]
        fast = [ops.copy(v) for v, _ in pairs]
        for variable, slow in pairs:
            self.assign(variable, ops.copy(slow))

        def restore():
            # Weights that have been trained since are the fast ones now.
            if int(ops.convert_to_numpy(self._iterations)) == updates:
                for (variable, _), value in zip(pairs, fast, strict=True):
                    self.assign(variable, value)

        return restore

    def _show_slow_weights(self):
        if self._swap is None:
            self._swap = self._swap_weights()

    def _restore_fast_weights(self):
        swap, self._swap = self._swap, None
        if swap is not None:
            swap()

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "sync_period": self.sync_period,
            "slow_step_size": self.slow_step_size,
            "name": self.name,
            "inner_state": self.inner_state,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes an optimizer from what `get_config` returns."""
        inner = keras.saving.deserialize_keras_object(
            config["optimizer"], custom_objects=custom_objects
        )
        return cls(**{**config, "optimizer": inner})


def _start(slow, fast):
    return [fast]


def _wait(iterations):
    # The same number, which XLA does not know: so A's update, which reads it, comes
    # after the start, and can be in place. Else XLA would copy θ, which both read.
    return [ops.maximum(iterations, 0)]


def _fill(slot, value):
    return [ops.full_like(slot, value)]


def _is_float(variable):
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(variable.dtype))


def _get_optimizer(identifier):
    # A copy of a config, which Keras changes.
    given = dict(identifier) if isinstance(identifier, dict) else identifier
    error = None
    try:
        optimizer = keras.optimizers.get(given)
    except (ValueError, TypeError, KeyError) as raised:
        optimizer, error = None, raised
    if optimizer is None:
        raise ValueError(
            "expected optimizer to be a keras.optimizers.Optimizer, or the name or "
            f"config of one. Received: optimizer={identifier!r}"
        ) from error
    return optimizer
