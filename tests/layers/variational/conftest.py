from harness.values import leave_to_tensorflow

# What JAX repeats: contracts, the dense layers, and what its tracers and keys may make
# different.
KEPT = (
    "test_contract",
    "test_dense",
    "test_distributions",
    "test_divergence",
    "what_raises",
    "compiles_behind",
    "there_and_back",
    "of_a_deep_network",
    "half_precision",
)


def pytest_collection_modifyitems(config, items):
    leave_to_tensorflow(config, items, "variational", KEPT)
