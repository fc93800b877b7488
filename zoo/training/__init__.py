"""Training and evaluation of the zoo's models."""

from .evaluate import evaluate
from .train import TrainResult, train

__all__ = ["TrainResult", "evaluate", "train"]
