"""The one way to a data set: by its tensorflow-datasets name."""

import importlib
import os
import random

import tensorflow_datasets as tfds

# The builders of this package, imported when asked for; all others are
# tensorflow-datasets' own.
_BUILDERS = {
    "breast_cancer": ".breast_cancer",
    "camel_case": ".camel_case",
    "diabetes": ".diabetes",
    "digits": ".digits",
    "python_source": ".python_source",
}


def load(name, split=None, *, data_dir=None, as_supervised=True):
    """Loads a data set, after preparing it if it is not there yet.

    The order of the examples is fixed. Preparation happens in a folder beside the
    final one and ends with a rename: interrupted, it leaves no broken data set, and
    of several processes that prepare at once one provides it to all.

    Args:
        name: A tensorflow-datasets name: `"breast_cancer"`, `"camel_case"`,
            `"diabetes"`, `"digits"` and `"python_source"` are prepared without a
            network, others such as `"cifar10"` are downloaded.
        split: Which examples, such as `"train"` or `"train[:80%]+validation"`, or a
            list of those. Without one, all splits.
        data_dir: Folder of the prepared data sets. Defaults to the environment
            variable `TFDS_DATA_DIR` or else `~/tensorflow_datasets`.
        as_supervised: Whether examples are pairs `(input, label)` and not dicts; an
            input of several tensors is a dict.

    Returns:
        `(dataset, info)`: a `tf.data.Dataset` (a list of them for a list of splits,
        a dict by name for none), and the `tfds.core.DatasetInfo`.

    Raises:
        ValueError: If the split does not exist.
        tfds.core.DatasetNotFoundError: If the data set does not exist.

    Example:

    >>> from kzoo.zoo import load
    >>> dataset, info = load("digits", "validation")
    >>> info.splits["train"].num_examples, dataset.element_spec[0].shape
    (1258, TensorShape([8, 8, 1]))
    """
    builder = _builder(name, data_dir)
    dataset = builder.as_dataset(
        split=split, as_supervised=as_supervised, shuffle_files=False
    )
    return dataset, builder.info


def _builder(name, data_dir):
    """Returns the builder of a prepared data set."""
    base = name.partition(":")[0].partition("/")[0]
    if base in _BUILDERS:
        importlib.import_module(_BUILDERS[base], __package__)
    # Read now: tensorflow-datasets reads the variable when it is imported.
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    builder = tfds.builder(name, data_dir=data_dir)
    # The folder of a preparation has a random name: it must not be that of another
    # process with the same seed, nor change what the program draws afterwards.
    state = random.getstate()
    random.seed()
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                try_download_gcs=base not in _BUILDERS  # asks the network
            )
        )
    except OSError:
        # Another process may have put it in place while this one prepared it, and
        # what is in place is whole; else the error is a real one.
        if not builder.data_path.exists():
            raise
    finally:
        random.setstate(state)
    # A builder made before its data were there does not know their splits.
    return tfds.builder(name, data_dir=data_dir)
