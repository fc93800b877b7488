"""Keras optimizers. The only index: one line a public class."""

from .._backend import require_supported

require_supported()

# ruff: noqa: E402, F401
from .averaged_sgd import AveragedSGD, NonMonotonicTrigger
from .fast_weights import ScaledSchedule, with_fast_weights
from .kfac.adaptation import Adaptation
from .kfac.blocks.base import CurvatureBlock, register_curvature_block
from .kfac.diagnostics import KFACDiagnostics
from .kfac.kfac import KFAC
from .kfac.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    register_likelihood,
)
from .lookahead.lookahead import Lookahead
from .lookahead.slow_weights import SwapSlowWeights
from .step_decay import StepDecay
