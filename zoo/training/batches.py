"""Training batches whose order is a function of the seed and the epoch alone."""

import tensorflow as tf

SHUFFLE_BUFFER = 1 << 16


def training_batches(
    examples, count, *, batch_size, copies, max_shift, flip, seed, first_epoch, epochs
):
    """Returns the batches of the epochs `first_epoch` ... `epochs - 1`, in a row.

    Every epoch has `count // batch_size` batches; the examples left over are others
    each time. Shuffling is complete for up to 65,536 examples, beyond that within a
    moving window of so many.

    Args:
        examples: `tf.data.Dataset` of pairs `(x, y)` in a fixed order.
        count: Number of examples.
        batch_size: Number of different examples in a batch.
        copies: How often a batch is repeated, one copy after the other.
        max_shift: Images are shifted by up to so many pixels, each way, and filled
            up with zeros.
        flip: Whether half of the images, at random, are mirrored left to right.
        seed: Integer.
        first_epoch: The first epoch to give.
        epochs: The end of the last.

    Returns:
        `tf.data.Dataset` of batches of `copies * batch_size` rows.
    """

    def epoch_batches(epoch):
        # The graph's half of the shuffle's seed pair, of the graph traced here only,
        # which would otherwise be TensorFlow's global seed. TensorFlow cannot tell a
        # pair with a tensor in it from (0, 0): keep it off 0.
        tf.random.set_seed(1 + seed % (2**31 - 2))
        batches = examples.shuffle(
            min(count, SHUFFLE_BUFFER), seed=epoch, reshuffle_each_iteration=False
        )
        batches = batches.batch(batch_size, drop_remainder=True)
        if max_shift or flip:

            def augment(step, batch):
                images, labels = batch
                key = tf.random.experimental.stateless_fold_in([seed, epoch], step)
                if max_shift:
                    images = shift_images(images, max_shift, key)
                if flip:
                    key = tf.random.experimental.stateless_fold_in(key, 1)
                    images = flip_images(images, key)
                return images, labels

            batches = batches.enumerate().map(augment)
        if copies > 1:
            batches = batches.map(lambda *batch: tuple(map(_repeat, batch)))
        return batches

    def _repeat(x):
        return tf.tile(x, [copies] + [1] * (x.shape.rank - 1))

    epochs = tf.data.Dataset.range(first_epoch, epochs)
    return epochs.flat_map(epoch_batches).prefetch(tf.data.AUTOTUNE)


def shift_images(images, max_shift, key):
    """Shifts every image of a batch by up to `max_shift` pixels each way.

    Args:
        images: Tensor `[B, height, width, channels]`.
        max_shift: Integer.
        key: Two integers, which determine the shifts.

    Returns:
        Tensor like `images`; what comes in from outside is zero.
    """
    rows, height, width = (tf.shape(images)[i] for i in range(3))
    edge = [max_shift, max_shift]
    padded = tf.pad(images, [[0, 0], edge, edge, [0, 0]])
    offsets = tf.random.stateless_uniform(
        [2, rows, 1], key, maxval=2 * max_shift + 1, dtype=tf.int32
    )
    shifted = tf.gather(padded, offsets[0] + tf.range(height), axis=1, batch_dims=1)
    shifted = tf.gather(shifted, offsets[1] + tf.range(width), axis=2, batch_dims=1)
    return tf.ensure_shape(shifted, images.shape)


def flip_images(images, key):
    """Mirrors every image of a batch left to right with probability 1/2.

    Args:
        images: Tensor `[B, height, width, channels]`.
        key: Two integers, which determine which.

    Returns:
        Tensor like `images`.
    """
    coins = tf.random.stateless_uniform([tf.shape(images)[0], 1, 1, 1], key) < 0.5
    return tf.where(coins, tf.reverse(images, [2]), images)
