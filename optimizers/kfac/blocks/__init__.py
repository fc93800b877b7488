"""What the weights of a layer multiply: one file for each kind of layer."""

# ruff: noqa: F401
from . import (
    conv,
    dense,
    einsum_dense,
    embedding,
    normalization,
    recurrent,
    time_distributed,
    variational,
)
