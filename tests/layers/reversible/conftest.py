from harness.values import leave_to_tensorflow

KEPT = ("test_contract", "ten_thousand", "noticed", "backpropagation[None")


def pytest_collection_modifyitems(config, items):
    leave_to_tensorflow(config, items, "reversible", KEPT)
