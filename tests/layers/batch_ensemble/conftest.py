from harness.values import leave_to_tensorflow

KEPT = ("test_contract", "test_initializers", "test_conversion", "test_rank1", "drop")


def pytest_collection_modifyitems(config, items):
    leave_to_tensorflow(config, items, "batch_ensemble", KEPT)
