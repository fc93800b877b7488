import keras
import pytest

from harness import check_cell, check_layer
from kzoo.layers import RevGRU, RevGRUCell, RevLSTM, RevLSTMCell

ARGUMENTS = {
    "units": 4,
    "activation": "softsign",
    "recurrent_activation": "hard_sigmoid",
    "use_bias": True,
    "kernel_initializer": "he_normal",
    "recurrent_initializer": "glorot_uniform",
    "bias_initializer": keras.initializers.RandomNormal(0.0, 0.5, seed=5),
    "kernel_regularizer": "l2",
    "recurrent_regularizer": "l1",
    "bias_regularizer": keras.regularizers.L2(0.1),
    "kernel_constraint": "max_norm",
    "recurrent_constraint": "unit_norm",
    "bias_constraint": "non_neg",
    "seed": 1,
}
GRU = {**ARGUMENTS, "max_forget_bits": 3, "dropout": 0.25}
LSTM = {
    **ARGUMENTS,
    "max_forget_bits": 2,
    "state_bits": 20,
    "gate_bits": 9,
    "unit_forget_bias": False,
    "recurrent_dropout": 0.25,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer, kwargs",
    [
        (RevGRU, {**GRU, "return_sequences": True, "go_backwards": True}),
        (RevLSTM, {**LSTM, "return_state": True, "zero_output_for_mask": True}),
    ],
)
def test_contract(layer, kwargs):
    check_layer(layer, kwargs, (4, 3, 2))


@pytest.mark.slow
@pytest.mark.parametrize("cell, kwargs", [(RevGRUCell, GRU), (RevLSTMCell, LSTM)])
def test_contract_of_cells(cell, kwargs):
    check_cell(cell, kwargs, (4, 2, 2))
