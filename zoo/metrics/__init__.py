"""Metrics of calibration and uncertainty. One line a public class."""

from .area_under_risk_coverage import AreaUnderRiskCoverage
from .brier_score import BrierScore
from .coverage_at_risk import CoverageAtRisk
from .ensemble_negative_log_likelihood import EnsembleNegativeLogLikelihood
from .expected_calibration_error import ExpectedCalibrationError
from .mutual_information import MutualInformation
from .out_of_distribution_auroc import OutOfDistributionAUROC
from .out_of_distribution_fpr import OutOfDistributionFPR
from .predictive_entropy import PredictiveEntropy
from .risk_at_coverage import RiskAtCoverage

__all__ = [
    "AreaUnderRiskCoverage",
    "BrierScore",
    "CoverageAtRisk",
    "EnsembleNegativeLogLikelihood",
    "ExpectedCalibrationError",
    "MutualInformation",
    "OutOfDistributionAUROC",
    "OutOfDistributionFPR",
    "PredictiveEntropy",
    "RiskAtCoverage",
]
