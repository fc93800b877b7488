"""Sequences of tasks for lifelong learning, made of one data set."""

import numpy as np
import tensorflow as tf

from ...layers.ops.arguments import integer
from .load import load


def split_classes(name, classes_per_task=2, *, data_dir=None):
    """Makes a task of each few classes of a data set.

    With n classes a task, the first has the classes 0 to n - 1, the second n to
    2n - 1, and so on; what is left over makes a smaller one. Labels start at 0 in each
    task.

    Reference: Zenke, Poole, Ganguli, "Continual Learning Through Synaptic
    Intelligence", 2017. https://arxiv.org/abs/1703.04200

    Args:
        name: A data set's name, as `kzoo.zoo.load` takes it, of inputs and labels.
        classes_per_task: n.
        data_dir: Folder of the prepared data sets.

    Returns:
        dict from a task's name, such as `"classes 0-1"`, to a dict from a split's name
        to its `tf.data.Dataset` of pairs `(input, label)`.

    Raises:
        ValueError: If `classes_per_task` is not an integer of at least 1, or the data
            set has no classes.

    Example:

    >>> from kzoo.zoo.datasets import split_classes
    >>> tasks = split_classes("digits")
    >>> list(tasks)[:2], sorted({int(y) for _, y in tasks["classes 2-3"]["train"]})
    (['classes 0-1', 'classes 2-3'], [0, 1])
    """
    n = integer("classes_per_task", classes_per_task)
    splits, info = load(name, data_dir=data_dir)
    count = getattr(info.features[info.supervised_keys[1]], "num_classes", None)
    if count is None:
        raise ValueError(f"expected a data set with classes. Received: {name!r}")

    def task(first, last):
        def is_of_task(_, y):
            return (y >= first) & (y <= last)

        def numbered(x, y):
            return x, y - first

        return {k: d.filter(is_of_task).map(numbered) for k, d in splits.items()}

    bounds = [(i, min(i + n, count) - 1) for i in range(0, count, n)]
    return {
        f"classes {first}-{last}" if last > first else f"class {first}": task(
            first, last
        )
        for first, last in bounds
    }


def permute_pixels(name, tasks=5, *, seed=0, data_dir=None):
    """Makes tasks of a data set of images by permuting their pixels.

    Task 0 has the images as they are; each other has all pixels at other places, the
    same for all images of the task, and channels together.

    Reference: Goodfellow, Mirza, Xiao, Courville, Bengio, "An Empirical Investigation
    of Catastrophic Forgetting in Gradient-Based Neural Networks", 2013.
    https://arxiv.org/abs/1312.6211

    Args:
        name: A data set's name, as `kzoo.zoo.load` takes it, of images and labels.
        tasks: Number of tasks.
        seed: Integer, for the same permutations again.
        data_dir: Folder of the prepared data sets.

    Returns:
        dict from a task's name, `"permutation 0"` and so on, to a dict from a split's
        name to its `tf.data.Dataset` of pairs `(image, label)`.

    Raises:
        ValueError: If `tasks` is not an integer of at least 1, or the inputs are no
            images of one size.

    Example:

    >>> from kzoo.zoo.datasets import permute_pixels
    >>> tasks = permute_pixels("digits", tasks=2)
    >>> plain, other = (next(iter(t["test"]))[0].numpy() for t in tasks.values())
    >>> bool((plain == other).all()), sorted(plain.flat) == sorted(other.flat)
    (False, True)
    """
    splits, _ = load(name, data_dir=data_dir)
    shape = next(iter(splits.values())).element_spec[0].shape
    if shape.rank != 3 or not shape.is_fully_defined():
        raise ValueError(
            "expected a data set of images of one size, [height, width, channels]. "
            f"Received: {name!r}, with inputs of shape {shape}"
        )
    height, width, channels = shape
    numbers = np.random.default_rng(seed)

    def task(i):
        order = np.arange(height * width)
        if i:
            order = numbers.permutation(order)

        def permuted(x, y):
            pixels = tf.gather(tf.reshape(x, (-1, channels)), order)
            return tf.reshape(pixels, shape), y

        return {k: d.map(permuted) for k, d in splits.items()}

    return {f"permutation {i}": task(i) for i in range(integer("tasks", tasks))}
