from harness.values import leave_to_tensorflow

# What JAX repeats: all of test_kfac.py's but the values of its steps, and of each kind
# of block what its loops, masks and gradients may make different.
KEPT = {
    "kfac": (
        "contract",
        "one_example",
        "not_finite",
        "accumulated",
        "loss_scale",
        "sampled",
        "periods",
        "trace",
        "as_without",
        "goes_on",
        "not_built",
        "transformer",
        "test_damping",
        "distribution",
        "dense_matrices[all]",
        "masks",
        "compiled_and_resumed",
        "forgotten",
        "[a dictionary]",
    ),
    "blocks": (
        "test_base",
        "first",
        "groups",
        "[lstm]",
        "[gru]",
        "[lstm-True]",
        "lags_change",
        "[batch]",
    ),
    "approximations": ("diagonal_of_the_exact", "masked", "sum_of_all", "gamma"),
}


def pytest_collection_modifyitems(config, items):
    for folder, kept in KEPT.items():
        leave_to_tensorflow(config, items, folder, kept)
