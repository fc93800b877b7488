"""The scales of pixels."""

import numpy as np
import pytest

from kzoo.zoo.models.pixels import CIFAR10, standardized


def test_channels_have_mean_0_and_variance_1():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)) * [1.0, 0.5, 0.2]
    statistics = [np.std(pixels / 255, (0, 1, 2)), np.mean(pixels / 255, (0, 1, 2))]
    found = standardized(stddev=statistics[0], mean=statistics[1])
    standard = pixels * found["scale"] + found["offset"]
    np.testing.assert_allclose(standard.mean((0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(standard.std((0, 1, 2)), 1)


def test_of_cifar10():
    mean = 255 * np.array([0.4914, 0.4822, 0.4465])
    deviation = 255 * np.array([0.2470, 0.2435, 0.2616])
    for pixel, standard in ((mean, 0), (mean - 2 * deviation, -2)):
        found = pixel * CIFAR10["scale"] + CIFAR10["offset"]
        np.testing.assert_allclose(found, standard, atol=1e-12)


def test_a_channel_without_its_deviation_is_refused():
    with pytest.raises(ValueError):
        standardized((0.5, 0.5), (0.2,))
