"""The one error the harness raises."""


class ContractError(AssertionError):
    """A component breaks the contract; the message starts with the check's name."""

    def __init__(self, check, message):
        super().__init__(f"{check}: {message}")
        self.check = check
