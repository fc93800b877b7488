"""Rank-1 Bayesian layers: BatchEnsemble's fast weights as distributions."""

import keras
from keras import ops

from ..ops.batch_ensemble import check_rows
from ..variational.base import BayesianLayer
from ..variational.distributions import MeanFieldNormal, NormalPrior, kl_divergence
from ..variational.mode import MEAN, mode
from .conv2d import Conv2DBatchEnsemble
from .dense import DenseBatchEnsemble

AROUND_ONE = MeanFieldNormal(loc_initializer="ones")
NEAR_ONE = NormalPrior(1.0, 0.1)


class Rank1Layer(BayesianLayer):
    """Draws r and s of each row, or of each member, at every call.

    A base to stand before a layer with BatchEnsemble's fast weights.
    """

    kinds = ("alpha", "gamma")

    def __init__(
        self,
        *,
        alpha_posterior_fn=AROUND_ONE,
        alpha_prior_fn=NEAR_ONE,
        alpha_divergence_fn=kl_divergence,
        gamma_posterior_fn=AROUND_ONE,
        gamma_prior_fn=NEAR_ONE,
        gamma_divergence_fn=kl_divergence,
        per_example=True,
        **kwargs,
    ):
        # The posteriors say how r and s start.
        points = {"rank": 1, "alpha_initializer": "ones", "gamma_initializer": "ones"}
        super().__init__(**points, **kwargs)
        self._set_functions(
            alpha_posterior_fn=alpha_posterior_fn,
            alpha_prior_fn=alpha_prior_fn,
            alpha_divergence_fn=alpha_divergence_fn,
            gamma_posterior_fn=gamma_posterior_fn,
            gamma_prior_fn=gamma_prior_fn,
            gamma_divergence_fn=gamma_divergence_fn,
        )
        self.per_example = per_example

    def _add_fast_weights(self, sizes_in, sizes_out):
        """Makes the distributions of r and s, of these sizes for each member."""
        sizes = (sizes_in, sizes_out)
        self._make_weights([(self.ensemble_size, *size) for size in sizes])

    def _fast_weights(self):
        """The means of r and s."""
        return self.alpha.posterior.mean(), self.gamma.posterior.mean()

    def _fast_weights_of(self, rows):
        """r and s, `[M, n]`, or drawn for each row, `[rows, n]`."""
        check_rows(rows, self.ensemble_size)
        return [self._drawn(weight, rows) for weight in (self.alpha, self.gamma)]

    def _drawn(self, weight, rows):
        q, now, of_member = weight.posterior, mode(), rows // self.ensemble_size
        if now is MEAN:
            found = q.mean()
        elif now is None and not self.per_example:
            found = q.sample(self.seed_generator)
        else:
            if now is None:
                draws = q.sample(self.seed_generator, of_member)
            else:  # Row n of a member has draw n mod K.
                draws = q.sample(now.seed(weight), now.count)
                draws = ops.tile(draws, (of_member // now.count, 1, 1))
            # [B, M, n] in the order of a member-major batch.
            found = ops.reshape(ops.swapaxes(draws, 0, 1), (rows, weight.shape[-1]))
        return ops.cast(found, self.compute_dtype)

    def divergence_scale(self):
        """β / (M N): what the divergences of all members count for in the loss."""
        # The posterior is the mixture q = (1/M) Σ_m q_m of the members', and as the
        # divergence is convex in q, KL(q, p) ≤ (1/M) Σ_m KL(q_m, p). With a loss that
        # is a mean over members, too, the sum is a bound on the negative evidence.
        return super().divergence_scale() / self.ensemble_size

    def get_config(self):
        """Returns the constructor's arguments."""
        config = {**super().get_config(), "per_example": self.per_example}
        for name in ("rank", "alpha_initializer", "gamma_initializer"):
            del config[name]
        return config


@keras.saving.register_keras_serializable(package="kzoo")
class DenseRank1(Rank1Layer, DenseBatchEnsemble):
    """M dense layers that share one kernel, with distributions over their fast weights.

    Member m's kernel is W ∘ (r sᵀ), with W shared and a point, and r and s drawn from
    posteriors q_m(r) and q_m(s), by default normal distributions whose means and
    standard deviations are trained: uncertainty on a rank-1 part of the kernel, at
    hardly more weights than one layer's. The batch is member-major, its first B rows
    for member 0, the next B for member 1, and so on. Row n of member m draws its own

        r_n ~ q_m(r),   s_n ~ q_m(s),   y_n = φ(((x_n ∘ r_n) W) ∘ s_n + b_m),

    as the authors' own layer does, so that the gradients of a batch have little noise
    in common. The M posteriors are the components of a mixture. The divergence of each
    from the prior is a loss, added once a step,

        (β / N) (1/M) sum_m [KL(q_m(r), p) + KL(q_m(s), p)],

    N the number of training examples and β what `kzoo.layers.DivergenceAnnealing`
    grows to 1: with a loss that is a mean over rows, a bound on the negative evidence,
    as the divergence of a mixture is at most the mean of its components'.

    Draws are new at each call, in training or not. `kzoo.layers.PosteriorMean` and
    `kzoo.layers.PosteriorSamples` predict by the means of r and s, and by draws that
    are the same for all rows of a member; `layer.member(m)` makes the plain layer that
    member m is at the means. `TileMembers` and `AverageMembers` put the
    same rows before every member and average what they predict.

    Takes `DenseBatchEnsemble`'s arguments, but `rank` and the fast weights'
    initializers, which their posteriors have, and for r and s those that
    `kzoo.layers.DenseFlipout` has for its kernel. `edward2.layers.DenseRank1`, of the
    paper's authors, differs:

    - it sums the divergences of the members, M times what the bound has
      (`layer.set_divergence_weight(M)` gives that), and leaves N to the user;
    - it starts r and s near 0, not around 1, which is where its users put them, and
      cuts them to [-10, 10];
    - its perturbations may be added (`use_additive_perturbation`), its bias drawn;
    - its inputs have two axes.

    Reference: Dusenberry, Jerfel, Wen, Ma, Snoek, Heller, Lakshminarayanan, Tran,
    "Efficient and Scalable Bayesian Neural Nets with Rank-1 Factors", 2020.
    https://arxiv.org/abs/2005.07186

    Args:
        units: Size of the output's last axis.
        activation: φ. Defaults to none.
        ensemble_size: M, the number of members.
        use_bias: Whether each member has a bias b_m.
        alpha_posterior_fn: Makes q of r, `[M, input_dim]`, as that of
            `kzoo.layers.DenseFlipout` makes the kernel's; any distribution that can be
            drawn from. Defaults to normal ones with means that start at 1. A
            `MeanFieldNormal` with a `batch_ensemble_initializer` for its means lets
            the members start apart.
        alpha_prior_fn: Makes p of r. Defaults to N(1, 0.1²); see `CauchyPrior` for
            the paper's other one. None: no divergence.
        alpha_divergence_fn: Function of q, p and a draw from q. Defaults to KL(q, p)
            in nats.
        gamma_posterior_fn: Makes q of s, `[M, units]`, and so the following.
        gamma_prior_fn: Makes p of s.
        gamma_divergence_fn: Its divergence.
        per_example: Whether each row draws its own r and s, or each member one for all
            of its rows.
        num_examples: N, what the divergences are divided by.
        seed: An integer, for the same draws again.
        kernel_initializer: For `kernel`, W: `[input_dim, units]`.
        bias_initializer: For `bias`, b: `[M, units]`.
        kernel_regularizer: Of W.
        bias_regularizer: Of b.
        activity_regularizer: Of the output.
        kernel_constraint: On W.
        bias_constraint: On b.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Member-major tensor. Its mask is passed on.

    Input shape:
        `[M * B, ..., input_dim]`.

    Output shape:
        `[M * B, ..., units]`.

    Raises:
        ValueError: If `units` or `ensemble_size` is not an integer of at least 1,
            `num_examples` not above 0, or on JAX if a function is not one of kzoo's;
            when called, if M does not divide the number of rows (in a TensorFlow graph
            that learns the number only when it runs, that is an InvalidArgumentError).

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import DenseRank1
    >>> layer = DenseRank1(3, ensemble_size=2, num_examples=1000, seed=0)
    >>> y = np.asarray(layer(np.ones((8, 5), "float32")))  # four rows a member
    >>> bool((y[0] == y[1]).any())  # equal rows, own draws
    False
    """

    def __init__(self, units, activation=None, **kwargs):
        super().__init__(units=units, activation=activation, **kwargs)


@keras.saving.register_keras_serializable(package="kzoo")
class Conv2DRank1(Rank1Layer, Conv2DBatchEnsemble):
    """M convolutions that share one kernel, with distributions over their fast weights.

    Member m's kernel is the shared W with its input channels scaled by r and its output
    channels by s, which are drawn from posteriors, by default for each image:

        r_n ~ q_m(r),   s_n ~ q_m(s),   y_n = φ(((x_n ∘ r_n) * W) ∘ s_n + b_m).

    All else is as `DenseRank1` says: the draws, the divergences and their scale, what
    differs from `edward2.layers.Conv2DRank1`. The kernel's arguments are
    `Conv2DBatchEnsemble`'s.

    Reference: Dusenberry, Jerfel, Wen, Ma, Snoek, Heller, Lakshminarayanan, Tran,
    "Efficient and Scalable Bayesian Neural Nets with Rank-1 Factors", 2020.
    https://arxiv.org/abs/2005.07186

    Args:
        filters: Number of output channels.
        kernel_size: Integer or pair: height and width of the window.
        strides: Integer or pair: steps along height and width.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `keras.config.image_data_format()`.
        dilation_rate: Integer or pair: spacing of the window's elements.
        groups: Number of groups of channels convolved apart.
        activation: φ. Defaults to none.
        ensemble_size: M, the number of members.
        use_bias: Whether each member has a bias b_m.
        alpha_posterior_fn: Makes q of r, `[M, channels]`, as `DenseRank1`'s.
        alpha_prior_fn: Makes p of r. Defaults to N(1, 0.1²). None: no divergence.
        alpha_divergence_fn: Function of q, p and a draw from q. Defaults to KL(q, p)
            in nats.
        gamma_posterior_fn: Makes q of s, `[M, filters]`, and so the following.
        gamma_prior_fn: Makes p of s.
        gamma_divergence_fn: Its divergence.
        per_example: Whether each image draws its own r and s, or each member one for
            all of its images.
        num_examples: N, what the divergences are divided by.
        seed: An integer, for the same draws again.
        kernel_initializer: For `kernel`, W: `[height, width, channels / groups,
            filters]`.
        bias_initializer: For `bias`, b: `[M, filters]`.
        kernel_regularizer: Of W.
        bias_regularizer: Of b.
        activity_regularizer: Of the output.
        kernel_constraint: On W.
        bias_constraint: On b.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Member-major batch of images.

    Input shape:
        `[M * B, height, width, channels]`; with `channels_first`,
        `[M * B, channels, height, width]`.

    Output shape:
        `[M * B, height', width', filters]`; with `channels_first`,
        `[M * B, filters, height', width']`.

    Raises:
        ValueError: As `DenseRank1`, and if `keras.layers.Conv2D` refuses an argument.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import Conv2DRank1
    >>> layer = Conv2DRank1(3, kernel_size=3, ensemble_size=2, num_examples=1000)
    >>> layer(np.ones((8, 6, 6, 1), "float32")).shape == (8, 4, 4, 3)
    True
    """

    def __init__(self, filters, kernel_size, **kwargs):
        super().__init__(filters=filters, kernel_size=kernel_size, **kwargs)
