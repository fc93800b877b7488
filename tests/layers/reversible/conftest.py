from harness.values import leave_to_tensorflow

KEPT = (
    "test_contract",
    "began[True",
    "noticed",
    "[RevLSTM-5",
    "right[RevGRU",
    "taken_inside",
    "no_compiler",
    "grows",
)


def pytest_collection_modifyitems(config, items):
    leave_to_tensorflow(config, items, "reversible", KEPT)
