"""Keeps the log of TensorFlow's native code off the terminal.

TensorFlow 2.21 writes informational lines to file descriptor 2 from the moment it is
imported, whatever `TF_CPP_MIN_LOG_LEVEL` says.
"""

import contextlib
import io
import os
import sys


@contextlib.contextmanager
def native_log_to(path=os.devnull):
    """Sends what native code logs to a file; Python's `sys.stderr` stays as it is.

    Args:
        path: The file, which is appended to.

    Example:

    >>> import os
    >>> from kzoo.zoo.native_log import native_log_to
    >>> with native_log_to():
    ...     _ = os.write(2, b"nobody reads this")
    """
    before = sys.stderr
    before.flush()
    terminal = os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)
    os.close(log)
    if _descriptor(before) == 2:
        sys.stderr = open(terminal, "w", buffering=1, closefd=False, errors="replace")
    try:
        yield
    finally:
        if sys.stderr is not before:
            sys.stderr.flush()
            sys.stderr = before
        before.flush()
        os.dup2(terminal, 2)
        os.close(terminal)


def _descriptor(stream):
    try:
        return stream.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return None
