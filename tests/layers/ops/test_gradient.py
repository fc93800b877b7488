import numpy as np
from keras import ops

from kzoo.layers.ops.gradient import gradients, jacobian_products, with_gradient
from kzoo.layers.ops.loops import vjp


def test_gradients():
    x, y, z = (ops.convert_to_tensor(v, "float32") for v in ([1.0, 2.0], 3.0, [4.0]))
    found = gradients(lambda x, y, z: ops.sum(x * x) * y, [x, y, z])
    for one, expected in zip(found, ([6.0, 12.0], 5.0, [0.0]), strict=True):
        np.testing.assert_allclose(one, expected)
    assert gradients(lambda: 1.0, []) == []


def test_the_gradient_of_a_table_is_dense():
    table = ops.ones((4, 2))
    (found,) = gradients(lambda t: ops.sum(ops.take(t, [1, 1, 3], axis=0)), [table])
    np.testing.assert_allclose(found, [[0, 0], [2, 2], [0, 0], [1, 1]])


def test_a_gradient_of_its_own_is_that_of_values_inside_of_others_too():
    def gradient(given, upstream):
        (x, _), (d,) = given, upstream
        return 7 * x * d, None

    cube = with_gradient(lambda x, _: (x**3,), gradient)
    x, number = ops.convert_to_tensor([1.0, 2.0]), ops.convert_to_tensor([3, 4])

    def loss(x):
        return ops.sum(cube(x, number)[0])

    def inside(x):
        (value,), pull = vjp(lambda x: (loss(x),), x)
        pull((ops.ones_like(value),))
        return value

    np.testing.assert_allclose(loss(x), 9.0)
    for function in (loss, inside):
        np.testing.assert_allclose(gradients(function, [x])[0], [7.0, 14.0])


def test_jacobian_products():
    # Through a gradient of a layer's own, a loop, and a table of which rows are read.
    @ops.custom_gradient
    def cube(x):
        def gradient(*args, upstream=None):
            if upstream is None:
                (upstream,) = args
            return 3 * x * x * upstream

        return x * x * x, gradient

    def function(x, table, unused):
        y, _ = ops.scan(
            lambda y, row: (y * row, y), cube(x), ops.take(table, [0, 2], 0)
        )
        return y

    rng = np.random.default_rng(0)
    x, table = rng.normal(size=2), rng.normal(size=(3, 2))
    vectors = [[rng.normal(size=s) for s in ((2,), (3, 2), ())] for _ in range(2)]
    tensors = [ops.convert_to_tensor(t, "float32") for t in (x, table, 0.0)]
    found = jacobian_products(function, tensors, vectors)
    a, c = table[0], table[2]
    for row, (v, w, _) in zip(ops.convert_to_numpy(found), vectors, strict=True):
        expected = 3 * x**2 * v * a * c + x**3 * (w[0] * c + a * w[2])
        np.testing.assert_allclose(row, expected, rtol=1e-4)
