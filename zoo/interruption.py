"""Lets Ctrl-C through where Python swallows it."""

import _thread
import contextlib
import sys
import threading

AGAIN_SECONDS = 0.05


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
