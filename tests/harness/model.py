"""The contract of a registered model."""


def check_model(name):
    """Checks a registered model."""
    from kzoo.zoo import registry

    registry.build(name)
