from harness.values import leave_to_tensorflow


def pytest_collection_modifyitems(config, items):
    leave_to_tensorflow(config, items, "metrics", ["test_contract", "in_evaluate"])
