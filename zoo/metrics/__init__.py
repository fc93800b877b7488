"""Metrics of calibration and uncertainty. One line a public class."""

from .brier_score import BrierScore
from .ensemble_negative_log_likelihood import EnsembleNegativeLogLikelihood
from .expected_calibration_error import ExpectedCalibrationError
from .mutual_information import MutualInformation
from .predictive_entropy import PredictiveEntropy

__all__ = [
    "BrierScore",
    "EnsembleNegativeLogLikelihood",
    "ExpectedCalibrationError",
    "MutualInformation",
    "PredictiveEntropy",
]
