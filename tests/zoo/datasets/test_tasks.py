import numpy as np
import pytest

from kzoo.zoo import load
from kzoo.zoo.datasets import permute_pixels, split_classes

pytestmark = pytest.mark.tensorflow


def arrays(dataset):
    x, y = zip(*dataset.as_numpy_iterator(), strict=True)
    return np.stack(x), np.stack(y)


def test_classes_are_split_and_numbered_anew():
    tasks = split_classes("digits", 4)
    assert list(tasks) == ["classes 0-3", "classes 4-7", "classes 8-9"]
    for split in ("train", "validation", "test"):
        x, y = arrays(load("digits", split)[0])
        for task, first in zip(tasks.values(), (0, 4, 8), strict=True):
            inputs, labels = arrays(task[split])
            of_task = (y >= first) & (y < first + 4)
            np.testing.assert_array_equal(inputs, x[of_task])
            np.testing.assert_array_equal(labels + first, y[of_task])
    assert list(split_classes("digits", 9)) == ["classes 0-8", "class 9"]


def test_pixels_are_permuted_alike_in_a_task():
    tasks = permute_pixels("digits", 3, seed=1)
    x, y = arrays(load("digits", "test")[0])
    flat = x.reshape(len(x), -1)
    orders = []
    for i, task in enumerate(tasks.values()):
        inputs, labels = arrays(task["test"])
        np.testing.assert_array_equal(labels, y)
        found = inputs.reshape(len(x), -1)
        if i == 0:
            np.testing.assert_array_equal(inputs, x)
            continue
        # Each place has one other's pixels in all images.
        sources = [np.flatnonzero((flat.T == column).all(1)) for column in found.T]
        assert all(len(s) for s in sources)
        np.testing.assert_array_equal(np.sort(found, 1), np.sort(flat, 1))
        orders.append([s[0] for s in sources])
        train, _ = arrays(task["train"])
        assert train.shape[1:] == x.shape[1:]
    assert orders[0] != orders[1]
    again, _ = arrays(permute_pixels("digits", 3, seed=1)["permutation 2"]["test"])
    np.testing.assert_array_equal(again, inputs)


def test_refusals():
    with pytest.raises(ValueError, match="Received: classes_per_task=0"):
        split_classes("digits", 0)
    with pytest.raises(ValueError, match="with classes. Received: 'diabetes'"):
        split_classes("diabetes")
    with pytest.raises(ValueError, match="images of one size.*Received: 'diabetes'"):
        permute_pixels("diabetes")
    with pytest.raises(ValueError, match="Received: tasks=0"):
        permute_pixels("digits", 0)
