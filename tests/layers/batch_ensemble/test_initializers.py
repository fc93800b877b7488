import keras
import numpy as np
import pytest
from keras import ops

from harness.backends import compiled
from kzoo.layers import DenseBatchEnsemble, RandomSign, batch_ensemble_initializer


def values(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def again(initializer):
    """The initializer as a saved model would make it again."""
    return keras.initializers.get(keras.initializers.serialize(initializer))


@pytest.mark.parametrize("probs", (0.5, 0.25, 0.9))
def test_signs_come_with_their_probability(probs):
    signs = values(RandomSign(probs, seed=1)((500, 400)))
    assert set(signs.ravel()) == {-1.0, 1.0}
    z = (signs.mean() - (2 * probs - 1)) / np.sqrt(4 * probs * (1 - probs) / signs.size)
    assert abs(z) < 4.5


def test_certain_signs():
    np.testing.assert_array_equal(values(RandomSign(1.0)((50,))), 1)
    np.testing.assert_array_equal(values(RandomSign(0.0)((50,))), -1)


def test_default_is_a_fair_coin():
    assert RandomSign().get_config() == {"probs": 0.5, "seed": None}


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
def test_dtype(dtype):
    signs = RandomSign(seed=1)((40,), dtype)
    assert keras.backend.standardize_dtype(signs.dtype) == dtype
    assert set(values(signs)) == {-1.0, 1.0}


def test_seed():
    draw = values(RandomSign(seed=3)((100,)))
    np.testing.assert_array_equal(draw, values(RandomSign(seed=3)((100,))))
    assert (draw != values(RandomSign(seed=4)((100,)))).any()
    # Without a seed: the global one decides.
    drawn = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        drawn.append(values(RandomSign()((100,))))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    assert (values(RandomSign()((100,))) != values(RandomSign()((100,)))).any()


def test_same_signs_with_and_without_jit():
    def draw(x):
        return x * RandomSign(0.3, seed=5)((200,))

    ones = ops.ones((200,))
    np.testing.assert_array_equal(values(draw(ones)), values(compiled(draw)(ones)))


def test_config_round_trip():
    for initializer in (
        RandomSign(0.3, seed=7),
        batch_ensemble_initializer(0.3, seed=7),
    ):
        copy = again(initializer)
        assert type(copy) is RandomSign
        assert copy.get_config() == {"probs": 0.3, "seed": 7}
        np.testing.assert_array_equal(values(copy((9, 9))), values(initializer((9, 9))))
    normal = batch_ensemble_initializer(-0.5, seed=7)
    np.testing.assert_array_equal(values(again(normal)((9,))), values(normal((9,))))


def test_value_below_zero_is_normal_around_one():
    draws = values(batch_ensemble_initializer(-0.5, seed=1)((100_000,)))
    assert abs(draws.mean() - 1) * np.sqrt(draws.size) / 0.5 < 4.5
    assert abs(draws.std() / 0.5 - 1) * np.sqrt(2 * draws.size) < 4.5


def test_value_zero_is_ones():
    np.testing.assert_array_equal(values(batch_ensemble_initializer(0)((7,))), 1)


@pytest.mark.parametrize("value", (0.5, -0.5))
def test_one_unseeded_initializer_for_all_weights_gives_each_its_own_numbers(value):
    initializer = batch_ensemble_initializer(value)
    drawn = []
    for _ in range(2):
        layer = DenseBatchEnsemble(
            30, alpha_initializer=initializer, gamma_initializer=initializer
        )
        layer.build((None, 30))
        drawn += [values(layer.alpha.value), values(layer.gamma.value)]
    assert len({draw.tobytes() for draw in drawn}) == 4
    # So do the layers of a model made again from its config.
    copy = DenseBatchEnsemble.from_config(layer.get_config())
    copy.build((None, 30))
    assert (values(copy.alpha.value) != values(copy.gamma.value)).any()


def test_seeded_initializers_survive_the_layers_config():
    layer = DenseBatchEnsemble(
        30,
        alpha_initializer=RandomSign(0.5, seed=1),
        gamma_initializer=batch_ensemble_initializer(-0.5, seed=2),
    )
    copy = DenseBatchEnsemble.from_config(layer.get_config())
    for one in (layer, copy):
        one.build((None, 20))
    for name in ("alpha", "gamma"):
        np.testing.assert_array_equal(
            values(getattr(copy, name).value), values(getattr(layer, name).value)
        )


@pytest.mark.parametrize("probs", (-0.1, 1.1, "half"))
def test_bad_probability(probs):
    message = f"`probs` must be .*Received: probs={probs!r}"
    with pytest.raises(ValueError, match=message):
        RandomSign(probs)


@pytest.mark.parametrize("seed", ("1", 1.5, [1, 2], True))
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="`seed` must be an integer or None. Received"):
        RandomSign(seed=seed)


@pytest.mark.parametrize("value", (1.5, float("nan"), "half"))
def test_bad_value(value):
    with pytest.raises(ValueError, match=f"Received: value={value!r}"):
        batch_ensemble_initializer(value)
