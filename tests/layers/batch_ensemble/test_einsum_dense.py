import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from harness.members import (
    DTYPE,
    TOL,
    M,
    check_equal,
    check_isolated,
    check_ones,
    check_rank,
    normal,
    randomized,
    values,
    written_out,
)
from kzoo.layers import DenseBatchEnsemble, EinsumDenseBatchEnsemble

# Equation, output's shape, axes of the bias; the axes of r, s and W, in their order;
# shape of a row.
CASES = [
    ("...x,xyz->...yz", (2, 3), "yz", "x", "yz", "xyz", (2, 5)),
    ("...nh,nhx->...x", (4,), "x", "nh", "x", "nhx", (3, 2, 5)),
    ("abc,bcd->abd", (2, 3), "bd", "bc", "bd", "bcd", (2, 4)),  # A kernel for each b.
    ("abc,cb->ab", (2,), "b", "bc", "b", "cb", (2, 4)),
    ("abcd,bdef->aecf", (4, 3, 2), "e", "bd", "ef", "bdef", (3, 3, 2)),
    ("ab...,bc->ac...", (3,), None, "b", "c", "bc", (4, 2, 2)),
    ("abc,cd->ad", (3,), "d", "c", "d", "cd", (2, 4)),  # The sum over b has no weight.
    ("abc,cd->abcd", (2, 4, 3), "c", "c", "cd", "cd", (2, 4)),
    ("ab,c->abc", (2, 3), None, "", "c", "c", (2,)),  # One number for r.
]
IDS = [case[0] for case in CASES]


def pair(case, **kwargs):
    """A layer of a case, not built, the plain one, and a shape of inputs."""
    equation, output, bias, *_, row = case
    plain = keras.layers.EinsumDense(equation, output, bias_axes=bias, dtype=DTYPE)
    layer = EinsumDenseBatchEnsemble(
        equation, output, ensemble_size=M, bias_axes=bias, dtype=DTYPE, **kwargs
    )
    return layer, plain, (2 * M, *row)


@pytest.mark.slow
def test_contract():
    check_layer(
        EinsumDenseBatchEnsemble,
        {
            "equation": "abc,bcd->abd",
            "output_shape": (2, 3),
            "rank": 2,
            "ensemble_size": 3,
            "activation": "tanh",
            "bias_axes": "d",
            "kernel_initializer": "he_normal",
            "kernel_regularizer": "l2",
            "bias_regularizer": "l1",
        },
        (6, 2, 4),
    )


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_equals_explicit_kernels(case):
    layer, plain, shape = pair(case, rank=2, activation="tanh")
    *_, of_r, of_s, of_kernel, _ = case

    def scaled(shared, r, s):
        return [shared[0] * ops.einsum(f"{of_r},{of_s}->{of_kernel}", r, s)]

    plain.build(shape)
    randomized(layer, shape)
    check_equal(layer, written_out(layer, plain, scaled), normal(*shape))
    check_isolated(layer, normal(*shape), normal(*shape, seed=1))


@pytest.mark.parametrize("case", CASES[:3], ids=IDS[:3])
def test_ones_are_the_plain_layer(case):
    layer, plain, shape = pair(case)
    own = {IDS[0]: 5 + 6 + 6, IDS[1]: 10 + 4 + 4, IDS[2]: 8 + 6 + 6}[case[0]]
    check_ones(layer, plain, normal(*shape), own)


def test_rank_one_is_rank_k_with_zeros():
    one, _, shape = pair(CASES[2])
    three, _, _ = pair(CASES[2], rank=3)
    check_rank(randomized(one, shape), randomized(three, shape), normal(*shape))


def test_a_dense_equation_is_the_dense_layer():
    dense = DenseBatchEnsemble(4, ensemble_size=M, rank=2, dtype=DTYPE)
    layer = EinsumDenseBatchEnsemble(
        "...x,xy->...y", 4, ensemble_size=M, rank=2, bias_axes="y", dtype=DTYPE
    )
    shape = (2 * M, 3, 5)
    randomized(dense, shape)
    layer.build(shape)
    layer.set_weights(dense.get_weights())
    x = normal(*shape)
    np.testing.assert_allclose(values(layer(x)), values(dense(x)), TOL, TOL)


def test_the_kernels_fans_are_the_plain_layers():
    layer = EinsumDenseBatchEnsemble(
        "abc,cnh->abnh",
        (None, 50, 40),
        kernel_initializer=keras.initializers.GlorotUniform(seed=0),
    )
    layer.build((None, 3, 10))
    plain = keras.layers.EinsumDense(
        "abc,cnh->abnh",
        (None, 50, 40),
        kernel_initializer=keras.initializers.GlorotUniform(seed=0),
    )
    plain.build((None, 3, 10))
    np.testing.assert_array_equal(values(layer.kernel), values(plain.kernel))


def test_dots_are_kept_in_the_config():
    layer, plain, shape = pair(CASES[0])
    before = layer.get_config()
    layer.build(shape)
    assert before["equation"] == CASES[0][0] and before["output_shape"] == (2, 3)
    assert layer.get_config() == before
    assert layer.shared.equation == "abx,xyz->abyz"


@pytest.mark.parametrize(
    "equation, output_shape, bias_axes",
    [
        ("ab,ac->abc", (3, 3), None),  # The kernel has the batch's axis.
        ("abc,cd->bad", (6, 3), None),
        ("abc,cd->abd", (None, 3), "c"),
        ("abc,cd->abd", (3,), None),
    ],
)
def test_refuses_equations(equation, output_shape, bias_axes):
    layer = EinsumDenseBatchEnsemble(equation, output_shape, bias_axes=bias_axes)
    with pytest.raises(ValueError, match="Received: .*equation="):
        layer.build((6, 3) if equation.startswith("ab,") else (6, 6, 4))
    assert not layer.weights


def test_refuses_rows_that_do_not_split():
    layer, _, shape = pair(CASES[0])
    message = f"ensemble_size={M}. Received: a batch of 7 rows"
    with pytest.raises(ValueError, match=message):
        layer(normal(7, *shape[1:]))
    with pytest.raises(ValueError, match=message):
        layer.compute_output_shape((7, *shape[1:]))
