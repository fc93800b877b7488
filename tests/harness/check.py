"""One named check of the contract: what it expected, what it received."""

import keras
import numpy as np


class ContractError(AssertionError):
    """A component breaks the contract; the message starts with the check's name."""

    def __init__(self, check, message):
        super().__init__(f"{check}: {message}")
        self.check = check


class Check:
    """A `with` block that turns every failure inside it into a ContractError.

    Whatever is raised inside the block, by the component or by Keras, becomes a
    `ContractError` that starts with the check's name, so a reader sees at once
    which part of the contract broke.
    """

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception) and not isinstance(error, ContractError):
            raise ContractError(
                self.name, f"expected it to run; Received {kind.__name__}: {error}"
            ) from error

    def that(self, truth, expected, received):
        """Requires `truth`."""
        if not truth:
            raise ContractError(self.name, f"{expected}; Received {received}")

    def equal(self, what, received, expected):
        """Requires two Python values to be equal."""
        self.that(
            received == expected, f"expected {what} to be {expected!r}", repr(received)
        )

    def close(self, what, received, expected, tol=1e-5):
        """Requires two structures of tensors to be equal up to `tol`."""
        received, expected = arrays(received), arrays(expected)
        self.equal(f"the number of {what}", len(received), len(expected))
        for i, (a, b) in enumerate(zip(received, expected, strict=True)):
            self.equal(f"the shape of {what} [{i}]", a.shape, b.shape)
            a, b = a.astype("float64"), b.astype("float64")
            same = np.isclose(a, b, rtol=tol, atol=tol, equal_nan=True)
            self.that(
                same.all(),
                f"expected {what} [{i}] to be equal to {tol:g}",
                f"{(~same).sum()} of {same.size} apart, by up to "
                f"{np.abs(a - b)[~same].max() if (~same).any() else 0:g}",
            )

    def finite(self, what, values):
        """Requires every number of a structure to be finite."""
        for i, a in enumerate(arrays(values)):
            self.that(
                np.isfinite(a.astype("float64")).all(),
                f"expected finite {what} [{i}]",
                a.ravel()[:8],
            )


def arrays(structure):
    """A flat list of numpy arrays; bfloat16 comes back as float32."""
    flat = []
    for leaf in keras.tree.flatten(structure):
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and keras.backend.standardize_dtype(dtype) == "bfloat16":
            leaf = keras.ops.cast(leaf, "float32")
        flat.append(keras.ops.convert_to_numpy(leaf))
    return flat


def differ(a, b):
    """Whether two structures of tensors differ in any number."""
    return not all(
        np.array_equal(u, v, equal_nan=True)
        for u, v in zip(arrays(a), arrays(b), strict=True)
    )
