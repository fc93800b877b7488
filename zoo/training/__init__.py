"""Training and evaluation of the zoo's models."""

from .evaluate import evaluate
from .evolution_strategies import EvolutionStrategies
from .train import TrainResult, train

__all__ = ["EvolutionStrategies", "TrainResult", "evaluate", "train"]
