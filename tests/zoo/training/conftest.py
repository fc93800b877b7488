"""Which tests of training JAX repeats: one of each kind of step, draw and file."""

from harness.values import leave_to_tensorflow

KEPT = (
    "test_contract",
    "learns_and_keeps",
    "goes_on[at1]",
    "[tile-128]",
    "own_weights[dense-arguments0]",
    "resumed_and_lowers",
    "learns_by_fit",
    "perturbations[False]",
    "test_saved_and_loaded",
    "the_same_to_the_bit[True]",
    "draws_take_the_place",
    "test_logs_what_all_pairs_say[entropy]",
    "member_metrics",
)


def pytest_collection_modifyitems(config, items):
    leave_to_tensorflow(config, items, "training", KEPT)
