"""Training and evaluation of the zoo's models."""

from .evaluate import evaluate
from .evolution_strategies import EvolutionStrategies
from .lifelong import Lifelong
from .member_metrics import MemberMetrics
from .out_of_distribution import OutOfDistribution
from .train import TrainResult, train

__all__ = [
    "EvolutionStrategies",
    "Lifelong",
    "MemberMetrics",
    "OutOfDistribution",
    "TrainResult",
    "evaluate",
    "train",
]
