"""Ctrl-C: lets it through where Python swallows it, and ends a command after it."""

import _thread
import contextlib
import os
import sys
import threading

AGAIN_SECONDS = 0.05
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@contextlib.contextmanager
def insistent_interrupts():
    """Raises KeyboardInterrupt again, a moment later, where it could not get through.

    Ctrl-C may fall into a destructor or a callback of the garbage collector (JAX has
    one), out of which no exception comes: Python reports it and goes on, and a
    command would not stop.

    Example:

    >>> from kzoo.zoo.interruption import insistent_interrupts
    >>> with insistent_interrupts():
    ...     pass
    """
    before = sys.unraisablehook

    def hook(unraisable):
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Not from here: this too is called where nothing can be raised.
            threading.Timer(AGAIN_SECONDS, _thread.interrupt_main).start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def leave(code):
    """Ends the process with a command's exit code; after Ctrl-C, at once.

    What Ctrl-C interrupted may have left threads of TensorFlow or gRPC at work, and
    these can crash when the interpreter is taken down under them.

    Args:
        code: The exit code.

    Example:

    >>> from kzoo.zoo.interruption import leave
    >>> try:
    ...     leave(1)
    ... except SystemExit as stop:
    ...     print(stop.code)
    1
    """
    if code == INTERRUPTED:
        with contextlib.suppress(OSError):  # Whoever read the output may be gone.
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
