"""Losses. One line a public class or function."""

from .gaussian_negative_log_likelihood import (
    GaussianNegativeLogLikelihood,
    gaussian_negative_log_likelihood,
)

__all__ = ["GaussianNegativeLogLikelihood", "gaussian_negative_log_likelihood"]
