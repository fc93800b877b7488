from harness.values import leave_to_tensorflow

KEPT = (
    "test_contract",
    "test_initializers",
    "a_plain_model[False-words]",
    "stays_one",
    "every_parameter_learns",
    "mean_and_variance",
)


def pytest_collection_modifyitems(config, items):
    leave_to_tensorflow(config, items, "batch_ensemble", KEPT)
