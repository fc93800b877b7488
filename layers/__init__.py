"""Keras layers. The only index: one line a public class."""

from .._backend import require_supported

require_supported()

# ruff: noqa: E402, F401
from .batch_ensemble.attention import MultiHeadAttentionBatchEnsemble
from .batch_ensemble.batch_normalization import BatchNormalizationBatchEnsemble
from .batch_ensemble.bias import BiasBatchEnsemble
from .batch_ensemble.conv1d import Conv1DBatchEnsemble
from .batch_ensemble.conv2d import Conv2DBatchEnsemble
from .batch_ensemble.conv2d_transpose import Conv2DTransposeBatchEnsemble
from .batch_ensemble.conv3d import Conv3DBatchEnsemble
from .batch_ensemble.conversion import from_batch_ensemble, to_batch_ensemble
from .batch_ensemble.dense import DenseBatchEnsemble
from .batch_ensemble.depthwise_conv2d import DepthwiseConv2DBatchEnsemble
from .batch_ensemble.einsum_dense import EinsumDenseBatchEnsemble
from .batch_ensemble.embedding import EmbeddingBatchEnsemble
from .batch_ensemble.gru import GRUBatchEnsemble, GRUCellBatchEnsemble
from .batch_ensemble.initializers import RandomSign, batch_ensemble_initializer
from .batch_ensemble.layer_normalization import LayerNormalizationBatchEnsemble
from .batch_ensemble.lstm import LSTMBatchEnsemble, LSTMCellBatchEnsemble
from .batch_ensemble.members import AverageMembers, TileMembers
from .batch_ensemble.prelu import PReLUBatchEnsemble
from .batch_ensemble.rank1 import Conv2DRank1, DenseRank1
from .batch_ensemble.separable_conv2d import SeparableConv2DBatchEnsemble
from .batch_ensemble.simple_rnn import (
    SimpleRNNBatchEnsemble,
    SimpleRNNCellBatchEnsemble,
)
from .mean_and_variance import MeanAndVariance
from .reversible.rev_gru import RevGRU, RevGRUCell
from .reversible.rev_lstm import RevLSTM, RevLSTMCell
from .temperature_scaling import TemperatureScaling
from .variational.attention import (
    MultiHeadAttentionFlipout,
    MultiHeadAttentionLocalReparameterization,
    MultiHeadAttentionReparameterization,
)
from .variational.conv import (
    Conv1DFlipout,
    Conv1DLocalReparameterization,
    Conv1DReparameterization,
    Conv2DFlipout,
    Conv2DLocalReparameterization,
    Conv2DReparameterization,
    Conv3DFlipout,
    Conv3DLocalReparameterization,
    Conv3DReparameterization,
)
from .variational.conv_transpose import (
    Conv2DTransposeFlipout,
    Conv2DTransposeLocalReparameterization,
    Conv2DTransposeReparameterization,
)
from .variational.conversion import from_bayesian, to_bayesian
from .variational.dense import (
    DenseFlipout,
    DenseLocalReparameterization,
    DenseReparameterization,
)
from .variational.depthwise_conv import (
    DepthwiseConv2DFlipout,
    DepthwiseConv2DLocalReparameterization,
    DepthwiseConv2DReparameterization,
)
from .variational.distributions import (
    CauchyPrior,
    MeanFieldNormal,
    NormalPrior,
    ScaleMixturePrior,
    kl_divergence,
    sampled_kl_divergence,
)
from .variational.divergence import DivergenceAnnealing, scale_divergence
from .variational.dropout import MonteCarloDropout, to_monte_carlo_dropout
from .variational.einsum_dense import (
    EinsumDenseFlipout,
    EinsumDenseLocalReparameterization,
    EinsumDenseReparameterization,
)
from .variational.embedding import (
    EmbeddingFlipout,
    EmbeddingLocalReparameterization,
    EmbeddingReparameterization,
)
from .variational.gru import (
    GRUCellFlipout,
    GRUCellReparameterization,
    GRUFlipout,
    GRUReparameterization,
)
from .variational.legacy import load_legacy_weights
from .variational.lstm import (
    LSTMCellFlipout,
    LSTMCellReparameterization,
    LSTMFlipout,
    LSTMReparameterization,
)
from .variational.prediction import PosteriorMean, PosteriorSamples
from .variational.simple_rnn import (
    SimpleRNNCellFlipout,
    SimpleRNNCellReparameterization,
    SimpleRNNFlipout,
    SimpleRNNReparameterization,
)
from .weight_drop import WeightDrop
