"""Curves of trainings, as the records of benchmarks have them."""


def reached(record, figure, value):
    """The first update, and its seconds, at which a figure is no more than a value.

    Args:
        record: Dict with a `curve` of `update`, `seconds` and the figure.
        figure: Its name, such as `"loss"`.
        value: A number.

    Returns:
        Pair of the update and the seconds, or None if it never is.
    """
    curve = record["curve"]
    for i, found in enumerate(curve[figure]):
        if found <= value:
            return curve["update"][i], curve["seconds"][i]
    return None
