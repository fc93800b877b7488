"""The shapes of a dense product that is written as an Einstein summation."""

import re
import string

from .arguments import is_integer


def einsum_shapes(equation, input_shape, output_shape):
    """Finds the kernel's and the output's shapes of `input,kernel->output`.

    Args:
        equation: Such as `"abc,cd->abd"`. Dots stand for any axes that input and
            output have in common: `"...x,xy->...y"`.
        input_shape: Shape with the batch axis; sizes may be None.
        output_shape: Sizes of the output's axes but the first and those that dots
            stand for: an integer or a tuple. None takes a size from the input.

    Returns:
        The equation without dots, the kernel's shape, the output's shape.

    Raises:
        ValueError: If the equation is none, or does not fit the shapes.

    Example:

    >>> from kzoo.layers.ops.einsum import einsum_shapes
    >>> einsum_shapes("...x,xyz->...yz", (None, 7, 5), (2, 3))
    ('abx,xyz->abyz', (5, 2, 3), (None, 7, 2, 3))
    """
    if is_integer(output_shape):
        output_shape = (int(output_shape),)
    input_shape, output_shape = tuple(input_shape), tuple(output_shape)
    matched = re.fullmatch(
        r"([a-zA-Z]*(?:\.{3})?[a-zA-Z]*),([a-zA-Z]+)->([a-zA-Z]*(?:\.{3})?[a-zA-Z]*)",
        equation.replace(" ", ""),
    )
    if not matched:
        raise ValueError(
            "expected `equation` to be 'input,kernel->output', each a word of letters. "
            f"Received: equation={equation!r}"
        )
    inputs, kernel, outputs = matched.groups()
    given = f"Received: equation={equation!r}, inputs of shape {input_shape}, "
    given += f"output_shape={output_shape}"
    hidden = len(input_shape) - len(inputs.replace("...", ""))
    if ("..." in inputs) != ("..." in outputs) or (hidden and "..." not in inputs):
        raise ValueError(
            f"expected an equation whose dots stand for the same axes twice. {given}"
        )
    free = [x for x in string.ascii_letters if x not in inputs + kernel + outputs]
    dots = "".join(free[: max(hidden, 0)])
    # The sizes that `output_shape` gives: not those of the batch and of the dots.
    named = outputs.replace("...", "")
    if not outputs.startswith("..."):
        named = named[1:]
    inputs, outputs = inputs.replace("...", dots), outputs.replace("...", dots)
    repeated = any(len(set(word)) < len(word) for word in (inputs, kernel, outputs))
    if repeated or len(input_shape) != len(inputs) or len(output_shape) != len(named):
        raise ValueError(f"expected an equation that fits the shapes. {given}")
    sizes = dict(zip(inputs, input_shape, strict=True))
    for axis, size in zip(named, output_shape, strict=True):
        if size is not None and sizes.get(axis) not in (None, size):
            raise ValueError(
                f"expected the axis {axis!r} to have one size in input and output. "
                f"{given}"
            )
        sizes[axis] = sizes.get(axis) if size is None else size
    unknown = [x for x in kernel if sizes.get(x) is None]
    unknown += [x for x in outputs if x not in sizes]
    if unknown:
        raise ValueError(
            f"expected the sizes of the axes {unknown} to follow from the shapes. "
            f"{given}"
        )
    return (
        f"{inputs},{kernel}->{outputs}",
        tuple(sizes[x] for x in kernel),
        tuple(sizes[x] for x in outputs),
    )


def bias_shape(equation, output_shape, axes):
    """Finds the shape of a bias that lies along some of an output's axes.

    Args:
        equation: `input,kernel->output`, without dots, as `einsum_shapes` gives it.
        output_shape: The whole output's shape, as it gives that.
        axes: Letters of the output's axes.

    Returns:
        The sizes of the output's axes from the bias's first one on, and 1 for those
        that the bias has not.

    Raises:
        ValueError: If a letter is none of the output's, or the size there is unknown.

    Example:

    >>> from kzoo.layers.ops.einsum import bias_shape
    >>> bias_shape("abc,cde->abde", (None, 7, 2, 3), "d")
    (2, 1)
    """
    letters = equation.split("->")[1]
    sizes = dict(zip(letters, output_shape, strict=True))
    if any(sizes.get(axis) is None for axis in axes):
        raise ValueError(
            "expected `bias_axes` to be axes of the output of known size. "
            f"Received: bias_axes={axes!r}, equation={equation!r}"
        )
    first = min(map(letters.index, axes))
    return tuple(sizes[x] if x in axes else 1 for x in letters[first:])
