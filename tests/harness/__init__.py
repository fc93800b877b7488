"""The contract every public component keeps, checked with one call."""

from .cell import check_cell
from .check import ContractError
from .layer import check_layer
from .loss import check_loss
from .metric import check_metric
from .model import check_model, check_same_model
from .optimizer import check_optimizer

__all__ = [
    "ContractError",
    "check_cell",
    "check_layer",
    "check_loss",
    "check_metric",
    "check_model",
    "check_optimizer",
    "check_same_model",
]
