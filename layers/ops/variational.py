"""The estimators of a linear map whose kernel is drawn from a posterior.

The kernel is W = W̄ + ΔW with E[ΔW] = 0. `linear(x, kernel)` is any map that is
linear in both and treats rows alike: a dense product, a convolution, ... Each
estimator returns an unbiased sample of linear(x, W); they differ in how the samples
of a batch's rows depend on each other, and so in the variance of gradients:

- reparameterization, linear(x, W̄ + ΔW), needs no function: all rows share one ΔW,
  so the variance of a batch's mean gradient does not fall with the batch's size;
- `flipout`: each row turns the signs of one shared ΔW̃ by a rank-one pattern of its
  own, which makes the rows' perturbations uncorrelated, at twice the cost;
- `local_reparameterization`: the outputs are drawn in place of the kernel,
  independently for each row and each position, at twice the cost.
"""

from keras import ops


def flipout(linear, x, mean, perturbation, signs_in, signs_out):
    """Row n has the kernel W̄ + ΔW̃ ∘ (s_n r_nᵀ), without forming it:

        y_n = linear(x_n, W̄) + linear(x_n ∘ s_n, ΔW̃) ∘ r_n.

    The entries of ΔW̃ must be independent and symmetric about 0: then each
    ΔW̃ ∘ (s_n r_nᵀ) has the distribution of ΔW̃, and two rows' are uncorrelated.

    Args:
        linear: Function of a tensor and a kernel, linear in both.
        x: Tensor `[rows, ...]`.
        mean: W̄.
        perturbation: ΔW̃, shaped as the kernel.
        signs_in: s: -1 or +1 for each row and input channel, to broadcast with x; or
            None, for +1.
        signs_out: r: -1 or +1 for each row and output channel, to broadcast with the
            output.

    Returns:
        Tensor, shaped as linear(x, W̄).
    """
    turned = x if signs_in is None else x * signs_in
    return linear(x, mean) + linear(turned, perturbation) * signs_out


def local_reparameterization(linear, x, mean, stddev, noise):
    """Draws the outputs, which are normal if the kernel's entries are:

        y = linear(x, W̄) + ε ∘ sqrt(linear(x², σ²)),   ε ~ N(0, 1).

    Each output has the distribution it has under the kernel's, but two outputs of one
    row that share entries of the kernel (positions of a convolution) are drawn
    independently.

    Args:
        linear: Function of a tensor and a kernel, linear in both.
        x: Tensor `[rows, ...]`.
        mean: W̄.
        stddev: σ, the standard deviations of the kernel's entries, in single precision
            at least: half precision has no room for squares.
        noise: Function of a shape that draws ε in σ's dtype.

    Returns:
        Tensor, shaped as linear(x, W̄).
    """
    y = linear(x, mean)
    variance = linear(ops.square(ops.cast(x, stddev.dtype)), ops.square(stddev))
    # Where nothing perturbs the output, sqrt'(0) would make the gradients NaN.
    positive = variance > 0
    spread = ops.where(positive, ops.sqrt(ops.where(positive, variance, 1)), 0)
    return y + ops.cast(noise(ops.shape(y)) * spread, y.dtype)
