"""The contract of a metric."""


def check_metric(metric_class, init_kwargs, y_true, y_pred):
    """Checks a metric."""
    metric_class(**init_kwargs)
