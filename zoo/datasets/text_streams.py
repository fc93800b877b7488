"""Texts as parallel streams of characters, for truncated backpropagation."""

import numpy as np
import tensorflow as tf

from ...layers.ops.arguments import integer
from .load import load

# One more than the largest code point.
_CODE_POINTS = 0x110000


def text_streams(
    name="python_source",
    splits=("train", "validation", "test"),
    *,
    rows,
    steps,
    least=100,
    feature="text",
    data_dir=None,
):
    """Loads the characters of texts as batches that go on where the last one ended.

    The texts of a split, one after the other, are one sequence c of ids, which is cut
    into B equal streams. (A text whose last line has no end gets one, so that the next
    text begins in a line of its own.) Batch t has T steps of each, and as labels the
    ids that follow:

        x[b, i] = c[b S + t T + i],   y[b, i] = c[b S + t T + i + 1],

    with S the length of a stream. So a model that carries its state from batch to
    batch reads each stream as one long sequence; gradients go back T steps at most.
    What does not make up a last step of all streams, or a last batch, is left out.

    Ids count the characters that the first split has at least `least` times, in their
    order, from 1; 0 stands for all others.

    Of tensorflow-datasets' own texts it takes those with a feature of text, such as
    `"tiny_shakespeare"`, `"lm1b"`, and those that its `huggingface:` names reach where
    the package `datasets` is installed: `"huggingface:wikitext/wikitext-2-raw-v1"`,
    and, with `feature="sentence"`, `"huggingface:ptb_text_only"`.

    Args:
        name: Name of a data set of texts, as `kzoo.zoo.load` takes it.
        splits: Names of splits; the first one makes the vocabulary.
        rows: B, the number of streams.
        steps: T, the number of steps in a batch.
        least: How often a character must occur to have an id of its own.
        feature: Name of the text in an example.
        data_dir: Folder of the data sets.

    Returns:
        `(streams, characters)`: a dict from each split to a `tf.data.Dataset` of pairs
        `(x, y)`, `[B, T]` each; and the text of all characters with an id of their
        own, whose first one has the id 1.

    Raises:
        ValueError: If a number is not an integer of at least 1, there is no split, a
            split has less than one batch, or examples have no such text.

    Example:

    Streams of twelve ids, in batches of five steps:

    >>> import numpy as np
    >>> from kzoo.zoo.datasets.text_streams import batches
    >>> for x, y in batches(np.arange(25), rows=2, steps=5).as_numpy_iterator():
    ...     print(*x.tolist(), y[0])
    [0, 1, 2, 3, 4] [12, 13, 14, 15, 16] [1 2 3 4 5]
    [5, 6, 7, 8, 9] [17, 18, 19, 20, 21] [ 6  7  8  9 10]
    """
    rows, steps = integer("rows", rows), integer("steps", steps)
    least, splits = integer("least", least), list(splits)
    if not splits:
        raise ValueError(f"expected a split. Received: splits={splits}")
    datasets, _ = load(name, splits, data_dir=data_dir, as_supervised=False)
    points = [code_points(dataset, feature) for dataset in datasets]
    found, counts = np.unique(points[0], return_counts=True)
    found = found[counts >= least]
    ids = np.zeros(_CODE_POINTS, "int32")
    ids[found] = np.arange(1, len(found) + 1)
    streams = {
        split: batches(ids[p], rows, steps)
        for split, p in zip(splits, points, strict=True)
    }
    return streams, "".join(map(chr, found))


def code_points(dataset, feature):
    """Returns the code points of all texts of a data set, each of whole lines."""
    spec = dataset.element_spec
    texts = [name for name, v in spec.items() if v == tf.TensorSpec([], tf.string)]
    if feature not in texts:
        raise ValueError(
            f"expected `feature` to be one of the texts {texts} of examples with "
            f"{sorted(spec)}. Received: feature={feature!r}"
        )
    found = (example[feature] for example in dataset.as_numpy_iterator())
    whole = (t + b"\n" if t and not t.endswith(b"\n") else t for t in found)
    text = b"".join(whole).decode()
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def batches(ids, rows, steps):
    """Returns the batches of ids, as `text_streams` says.

    Args:
        ids: Integers `[N]`.
        rows: B.
        steps: T.
    """
    count = (len(ids) - 1) // rows // steps
    if not count:
        raise ValueError(
            f"expected more than {rows} rows x {steps} steps of characters. Received: "
            f"{len(ids)}, rows={rows}, steps={steps}"
        )
    length = (len(ids) - 1) // rows
    starts = length * np.arange(rows)[:, None] + np.arange(count * steps)

    def cut(ids):
        streams = ids[starts].reshape(rows, count, steps)
        return np.ascontiguousarray(streams.swapaxes(0, 1))

    return tf.data.Dataset.from_tensor_slices((cut(ids), cut(ids[1:])))
