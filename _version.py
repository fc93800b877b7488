"""The one place that states kzoo's version."""

__version__ = "0.1.0"
