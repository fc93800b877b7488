from harness.values import leave_to_tensorflow

KEPT = (
    *("test_contract", "flipout", "test_posterior", "trained_together", "in_the_zoo"),
    "carried_through_fit_and_evaluate[RevGRU]",
)


def pytest_collection_modifyitems(config, items):
    leave_to_tensorflow(config, items, "models", KEPT)
