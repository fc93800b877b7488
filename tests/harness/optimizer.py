"""The contract of an optimizer."""


def check_optimizer(make):
    """Checks an optimizer."""
    make()
