"""Training batches: which examples, in which order, shifted how."""

import numpy as np
import pytest
import tensorflow as tf

from kzoo.zoo.training.batches import flip_images, shift_images, training_batches

pytestmark = pytest.mark.tensorflow

N, B = 23, 5
IMAGES = np.random.default_rng(0).integers(1, 17, (N, 6, 7, 2)).astype("uint8")


def batches(**changes):
    """Returns the labels, which number the examples, and the images by batch."""
    arguments = {
        "batch_size": B,
        "copies": 1,
        "max_shift": 0,
        "flip": False,
        "seed": 0,
        "first_epoch": 0,
        "epochs": 3,
        **changes,
    }
    examples = tf.data.Dataset.from_tensor_slices((IMAGES, np.arange(N)))
    x, y = zip(*training_batches(examples, N, **arguments), strict=True)
    return np.stack(y), np.stack(x)


def test_every_epoch_has_other_examples_in_another_order():
    labels, images = batches()
    assert labels.shape == (3 * 4, B)  # 4 whole batches an epoch, 3 examples left
    np.testing.assert_array_equal(images, IMAGES[labels])
    epochs = labels.reshape(3, -1)
    for epoch in epochs:
        assert len(set(epoch)) == 20
    assert len({frozenset(epoch) for epoch in epochs}) > 1
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_decides_and_nothing_else():
    tf.random.set_seed(1)
    labels, images = batches(max_shift=1)
    tf.random.set_seed(2)
    again, same = batches(max_shift=1)
    np.testing.assert_array_equal(labels, again)
    np.testing.assert_array_equal(images, same)
    other, _ = batches(max_shift=1, seed=1)
    assert not np.array_equal(labels, other)
    for seed in (-1, 2**40):
        batches(seed=seed)


def test_later_epochs_do_not_depend_on_where_the_run_starts():
    whole = batches(max_shift=2)
    tail = batches(max_shift=2, first_epoch=2)
    for a, b in zip(whole, tail, strict=True):
        np.testing.assert_array_equal(a[2 * 4 :], b)


def test_copies_come_one_after_the_other():
    labels, images = batches(copies=3, max_shift=1)
    once, image = batches(max_shift=1)
    np.testing.assert_array_equal(labels, np.tile(once, (1, 3)))
    np.testing.assert_array_equal(images, np.tile(image, (1, 3, 1, 1, 1)))


def shifted(image, dy, dx):
    """The image with its pixel (r, c) taken from (r + dy, c + dx), or zero."""
    height, width, _ = image.shape
    out = np.zeros_like(image)
    for r in range(height):
        for c in range(width):
            if 0 <= r + dy < height and 0 <= c + dx < width:
                out[r, c] = image[r + dy, c + dx]
    return out


def test_shifts_are_all_of_those_allowed_and_uniform():
    m, rows = 1, 1800
    images = tf.constant(np.repeat(IMAGES[:1], rows, 0))
    out = shift_images(images, m, [3, 4]).numpy()
    assert out.dtype == np.uint8
    offsets = [(dy, dx) for dy in range(-m, m + 1) for dx in range(-m, m + 1)]
    counts = [
        (out == shifted(IMAGES[0], dy, dx)).all((1, 2, 3)).sum() for dy, dx in offsets
    ]
    assert sum(counts) == rows  # every image is one of the nine shifts
    # Each has probability 1/9: within 5 standard deviations of 200.
    assert np.abs(np.array(counts) - 200).max() < 5 * np.sqrt(200 * 8 / 9)


def test_half_of_the_images_are_mirrored():
    rows = 1800
    out = flip_images(tf.constant(np.repeat(IMAGES[:1], rows, 0)), [3, 4]).numpy()
    assert out.dtype == np.uint8
    same, mirrored = (
        (out == image).all((1, 2, 3)) for image in (IMAGES[0], IMAGES[0][:, ::-1])
    )
    assert (same ^ mirrored).all()
    assert abs(same.sum() - 900) < 5 * np.sqrt(rows / 4)


def test_flips_and_shifts_are_independent_of_each_other(monkeypatch):
    monkeypatch.setitem(globals(), "IMAGES", np.repeat(IMAGES[:1], N, 0))
    (_, shifted_only), (_, both) = (
        batches(max_shift=1, flip=flip, epochs=40) for flip in (False, True)
    )
    # A mirrored image is the shifted one, mirrored.
    mirrored = (both == shifted_only[..., ::-1, :]).all((2, 3, 4))
    assert (mirrored ^ (both == shifted_only).all((2, 3, 4))).all()
    # Of the images that were shifted alike half are.
    black = shifted_only == 0
    edges = [black[:, :, 0], black[:, :, -1], black[..., 0, :], black[..., -1, :]]
    for edge in edges:
        group = edge.all((2, 3))
        assert abs(mirrored[group].mean() - 0.5) < 5 * 0.5 / np.sqrt(group.sum())
    assert 0.05 < mirrored.mean(1).std()  # and not whole batches alike


def test_shifts_differ_by_row_step_epoch_and_seed(monkeypatch):
    monkeypatch.setitem(globals(), "IMAGES", np.repeat(IMAGES[:1], N, 0))
    _, images = batches(max_shift=2)
    images = images.reshape(3, 4, B, -1)  # by epoch, step and row, all from one image
    _, others = batches(max_shift=2, seed=1)
    for a, b in (
        (images[..., 1:, :], images[..., :-1, :]),
        (images[:, 1:], images[:, :-1]),
        (images[1:], images[:-1]),
        (images, others.reshape(images.shape)),
    ):
        # 25 shifts are possible: about 1 pair in 25 has the same.
        assert (a == b).all(-1).mean() < 0.3
