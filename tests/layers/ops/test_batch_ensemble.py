import keras
import numpy as np
import pytest
from keras import ops

from harness.backends import compiled, gradients
from kzoo.layers.ops.batch_ensemble import (
    batch_ensemble,
    batch_ensemble_step,
    merge_members,
    per_member,
    repeat_members,
    split_members,
)

M, B, IN, OUT = 3, 2, 5, 4
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype("float32")


def fast_weights(rank=None):
    lead = (M,) if rank is None else (rank, M)
    return normal(*lead, IN), normal(*lead, OUT), normal(M, OUT)


def explicit(x, kernel, alpha, gamma, bias):
    """Each member's own kernel W ∘ (sum_k r s^T), its own rows, in float64."""
    alpha, gamma = (
        w.astype("float64").reshape(-1, M, w.shape[-1]) for w in (alpha, gamma)
    )
    rows = x.shape[0] // M
    outputs = []
    for m in range(M):
        own = kernel * np.einsum("ki,kj->ij", alpha[:, m], gamma[:, m])
        outputs.append(x[m * rows : (m + 1) * rows].astype("float64") @ own + bias[m])
    return np.concatenate(outputs)


def test_split_members_is_member_major():
    x = np.arange(12).reshape(6, 2)
    split = split_members(x, 3)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(split),
        [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]],
    )
    np.testing.assert_array_equal(ops.convert_to_numpy(merge_members(split)), x)
    # The order of a tiled batch: every member has the same rows.
    tiled = split_members(np.tile(x, (4, 1)), 4)
    for member in ops.convert_to_numpy(tiled):
        np.testing.assert_array_equal(member, x)


@pytest.mark.parametrize("rank", (None, 1, 3))
@pytest.mark.parametrize("shape", ((), (7,), (2, 3)))
def test_equals_explicit_kernels(rank, shape):
    x, kernel = normal(M * B, *shape, IN), normal(IN, OUT)
    alpha, gamma, bias = fast_weights(rank)
    calls = []

    def linear(x):
        calls.append(tuple(x.shape))
        return ops.matmul(x, kernel)

    result = batch_ensemble(linear, x, alpha, gamma, bias)
    bias = bias.reshape(M, *[1] * (len(shape) + 1), OUT)
    np.testing.assert_allclose(
        ops.convert_to_numpy(result),
        explicit(x, kernel, alpha, gamma, bias),
        rtol=1e-4,
        atol=1e-5,
    )
    # One call for all members and ranks.
    assert calls == [((rank or 1) * M * B, *shape, IN)]


def test_without_bias():
    x, kernel = normal(M * B, IN), normal(IN, OUT)
    alpha, gamma, bias = fast_weights()
    result = batch_ensemble(lambda x: ops.matmul(x, kernel), x, alpha, gamma)
    np.testing.assert_allclose(
        ops.convert_to_numpy(result),
        explicit(x, kernel, alpha, gamma, 0 * bias),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("rank", (None, 2))
def test_channels_on_another_axis(rank):
    x, kernel = normal(M * B, IN, 6, 7), normal(IN, OUT)
    alpha, gamma, bias = fast_weights(rank)
    first = batch_ensemble(
        lambda x: ops.einsum("bihw,io->bohw", x, kernel), x, alpha, gamma, bias, axis=1
    )
    last = batch_ensemble(
        lambda x: ops.matmul(x, kernel), x.transpose(0, 2, 3, 1), alpha, gamma, bias
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(first),
        ops.convert_to_numpy(last).transpose(0, 3, 1, 2),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("rank", (None, 2))
def test_axes_of_their_own(rank):
    """r along two axes of x with another between them, s and b each along one."""
    lead = (M,) if rank is None else (rank, M)
    x, kernel = normal(M * B, 2, 4, IN), normal(2, IN, OUT)
    alpha, gamma, bias = normal(*lead, 2, IN), normal(*lead, OUT), normal(M, 1, 4)
    result = batch_ensemble(
        lambda x: ops.einsum("nabc,acd->ndb", x, kernel),
        x,
        alpha,
        gamma,
        bias,
        axis=(1, 3),
        out_axis=1,
        bias_axis=(1, 2),
    )
    r, s = (w.reshape(-1, *w.shape[len(lead) - 1 :]) for w in (alpha, gamma))
    expected = np.einsum(
        "mnabc,acd,kmac,kmd->mndb", x.reshape(M, B, 2, 4, IN), kernel, r, s
    )
    expected = (expected + bias[:, None]).reshape(M * B, OUT, 4)
    np.testing.assert_allclose(
        ops.convert_to_numpy(result), expected, rtol=1e-4, atol=1e-5
    )


def test_per_member():
    x, a, c = normal(M * B, 4, IN), normal(M, 4, 1), normal(M, 4, 1)
    weights = [ops.convert_to_tensor(w) for w in (a, c)]
    result = per_member(lambda x, a, c: a * x**2 + c, x, *weights, axis=(1, 2))
    expected = (a[:, None] * x.reshape(M, B, 4, IN) ** 2 + c[:, None]).reshape(x.shape)
    np.testing.assert_allclose(ops.convert_to_numpy(result), expected, rtol=1e-5)
    # Where there are no weights there are no members.
    alone = per_member(lambda x, *none: (x, none), x[:1], None, None)
    assert alone[1] == (None, None)
    np.testing.assert_array_equal(alone[0], x[:1])
    one = per_member(lambda x, a, none: x * a, x, a[:, :, 0], None, axis=1)
    expected = x.reshape(M, B, 4, IN) * a[:, None]
    np.testing.assert_allclose(
        ops.convert_to_numpy(one), expected.reshape(x.shape), rtol=1e-5
    )
    with pytest.raises(ValueError, match="Received: a batch of 7 rows"):
        per_member(lambda x, a: x * a, np.zeros((7, 4)), a[:, :, 0])


@pytest.mark.parametrize("rank", (None, 2))
def test_gradients_equal_explicit_kernels(rank):
    """By the chain rule from the gradients of each member's own kernel."""
    x, kernel, out = normal(M * B, IN), normal(IN, OUT), normal(M * B, OUT)
    alpha, gamma, bias = fast_weights(rank)

    def loss(x, kernel, alpha, gamma, bias):
        linear = lambda x: ops.matmul(x, kernel)  # noqa: E731
        return ops.sum(batch_ensemble(linear, x, alpha, gamma, bias) * out)

    found = gradients(loss, x, kernel, alpha, gamma, bias)
    r, s = alpha.reshape(-1, M, IN), gamma.reshape(-1, M, OUT)
    xs, outs = x.reshape(M, B, IN), out.reshape(M, B, OUT)
    scale = np.einsum("kmi,kmo->mio", r, s)
    own = np.einsum("mbi,mbo->mio", xs, outs)  # gradient of member m's kernel
    expected = [
        np.einsum("mbo,mio,io->mbi", outs, scale, kernel).reshape(x.shape),
        np.einsum("mio,mio->io", own, scale),
        np.einsum("mio,io,kmo->kmi", own, kernel, s).reshape(alpha.shape),
        np.einsum("mio,io,kmi->kmo", own, kernel, r).reshape(gamma.shape),
        outs.sum(1),
    ]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_gradients_of_fast_weights_over_many_positions_in_half_precision(dtype):
    """A sum of 20,000 equal terms stops growing if it is kept in half precision."""
    positions = 20_000
    x = ops.cast(np.full((2, positions, 1), 1 / 32, "float32"), dtype)
    ones = [ops.ones((2, 1), dtype) + 0 for _ in range(3)]

    def loss(alpha, gamma, bias):
        y = batch_ensemble(lambda x: x, x, alpha, gamma, bias)
        return ops.sum(ops.cast(y, "float32"))

    for gradient, term in zip(gradients(loss, *ones), (1, 1, 32), strict=True):
        np.testing.assert_allclose(
            gradient.astype("float32"), term * positions / 32, rtol=0.01
        )


def test_equal_with_and_without_jit():
    x, kernel = normal(M * B, 7, IN), normal(IN, OUT)
    weights = fast_weights(2)

    def function(x, *weights):
        return batch_ensemble(lambda x: ops.matmul(x, kernel), x, *weights)

    tensors = [ops.convert_to_tensor(a) for a in (x, *weights)]
    np.testing.assert_allclose(
        ops.convert_to_numpy(compiled(function)(*tensors)),
        ops.convert_to_numpy(function(*tensors)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("rank", (None, 2))
def test_a_step_with_the_weights_of_each_row_is_the_same(rank):
    x, kernel = normal(M * B, IN), normal(IN, OUT)
    for *fast, bias in (fast_weights(rank), (*fast_weights(rank)[:2], None)):
        fast = [ops.convert_to_tensor(w) for w in fast]
        expected = batch_ensemble(lambda x: ops.matmul(x, kernel), x, *fast, bias)
        rows = [repeat_members(w, M * B) for w in fast]
        bias = None if bias is None else repeat_members(bias, M * B)
        np.testing.assert_allclose(
            ops.convert_to_numpy(batch_ensemble_step(kernel, x, *rows, bias)),
            ops.convert_to_numpy(expected),
            rtol=1e-5,
            atol=1e-6,
        )


def test_repeat_members_is_member_major():
    weights = np.arange(12).reshape(2, 3, 2)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(repeat_members(weights, 6)), weights.repeat(2, axis=1)
    )
    with pytest.raises(ValueError, match="Received: a batch of 7 rows"):
        repeat_members(weights, 7)


@pytest.mark.tensorflow
@pytest.mark.parametrize("jit", (True, False))
def test_repeat_members_of_rows_known_only_at_run_time(jit):
    import tensorflow as tf

    weights = normal(3, 2)
    repeat = tf.function(
        lambda x: repeat_members(weights, tf.shape(x)[0]),
        input_signature=[tf.TensorSpec([None])],
        jit_compile=jit,
    )
    np.testing.assert_array_equal(repeat(np.zeros(6)), weights.repeat(2, axis=0))
    for rows in (1, 2, 7):  # One row would broadcast to none.
        with pytest.raises(tf.errors.InvalidArgumentError):
            repeat(np.zeros(rows))


def test_rows_that_do_not_split():
    message = "divisible by ensemble_size=3. Received: a batch of 7 rows"
    with pytest.raises(ValueError, match=message):
        split_members(np.zeros((7, 2)), 3)
    with pytest.raises(ValueError, match=message):
        batch_ensemble(lambda x: x, np.zeros((7, IN)), *fast_weights()[:2])


@pytest.mark.tensorflow
def test_rows_known_only_at_run_time():
    import tensorflow as tf

    alpha, gamma, bias = fast_weights()
    kernel = normal(IN, OUT)

    def layer(x):
        return batch_ensemble(lambda x: ops.matmul(x, kernel), x, alpha, gamma, bias)

    signature = [tf.TensorSpec([None, None, IN])]
    graph = tf.function(layer, input_signature=signature)
    assert graph.get_concrete_function().output_shapes.as_list() == [None, None, OUT]
    x = normal(M * B, 7, IN)
    np.testing.assert_allclose(graph(x), layer(x), rtol=1e-5, atol=1e-5)
    split = tf.function(lambda x: split_members(x, M), input_signature=signature)
    assert split.get_concrete_function().output_shapes.as_list() == [M, None, None, IN]
    message = "divisible by ensemble_size=3"
    for function in (graph, split):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            function(normal(7, 3, IN))
        # A number of elements that would split does not make the rows split.
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            function(normal(2, 3, IN))
    # XLA has no assertions; the rows are refused all the same.
    xla = tf.function(layer, input_signature=signature, jit_compile=True)
    np.testing.assert_allclose(xla(x), layer(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(tf.errors.InvalidArgumentError):
        xla(normal(7, 3, IN))  # though 7 * 3 is divisible by 3


def test_empty_positions():
    alpha, gamma, bias = fast_weights()
    x = np.zeros((M * B, 0, IN), "float32")
    y = batch_ensemble(lambda x: x[..., :OUT], x, alpha, gamma, bias)
    assert tuple(y.shape) == (M * B, 0, OUT)


def test_empty_batch():
    alpha, gamma, bias = fast_weights()
    x = np.zeros((0, IN), "float32")
    y = batch_ensemble(lambda x: ops.matmul(x, normal(IN, OUT)), x, alpha, gamma, bias)
    assert tuple(y.shape) == (0, OUT)
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
