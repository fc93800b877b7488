"""Where the weights of Bayesian models start."""

import keras
import numpy as np
import pytest

from kzoo.layers import DenseFlipout
from kzoo.zoo.models.posterior import normal_around


@pytest.mark.parametrize("stddev", [1e-3, 0.05, 2.0])
def test_starts_at_the_plain_weights_with_the_given_deviation(stddev):
    layer = DenseFlipout(50, kernel_posterior_fn=normal_around("he_normal", stddev))
    layer.build((None, 200))
    q = layer.kernel_posterior
    found = keras.ops.convert_to_numpy(q.stddev())
    np.testing.assert_allclose(found, stddev, rtol=1e-3)
    mean = keras.ops.convert_to_numpy(q.mean())
    assert mean.std() == pytest.approx(np.sqrt(2 / 200), rel=0.05)


@pytest.mark.parametrize("stddev", [0, -1.0, float("inf"), float("nan")])
def test_no_deviation_is_refused(stddev):
    with pytest.raises(ValueError, match="above 0. Received: stddev="):
        normal_around("he_normal", stddev)
