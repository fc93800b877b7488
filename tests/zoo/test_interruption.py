import gc
import signal
import subprocess
import sys
import time

import pytest

from kzoo.zoo.interruption import insistent_interrupts


def collect_and_wait():
    """Ctrl-C falls into a callback of the garbage collector; then work goes on."""
    sent = []

    def callback(phase, info):
        if not sent:
            sent.append(phase)
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)  # Here Python raises, and swallows it.

    gc.callbacks.append(callback)
    try:
        gc.collect(0)  # Little to collect: no destructor meets the second interrupt.
    finally:
        gc.callbacks.remove(callback)
    assert sent
    end = time.monotonic() + 5
    while time.monotonic() < end:
        time.sleep(0.01)


def test_an_interrupt_that_is_swallowed_comes_again():
    before = sys.unraisablehook
    waited = []
    with pytest.raises(KeyboardInterrupt), insistent_interrupts():
        collect_and_wait()
        waited.append(True)
    assert not waited
    assert sys.unraisablehook is before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_other_errors_are_reported_as_before(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)

    class Fails:
        def __del__(self):
            raise ValueError("in a destructor")

    with insistent_interrupts():
        Fails()
    (unraisable,) = reported
    assert unraisable.exc_type is ValueError


def test_after_an_interrupt_a_command_ends_at_once():
    code = (
        "import atexit; from kzoo.zoo.interruption import leave; "
        "atexit.register(print, 'taken down'); print('said'); leave({})"
    )
    for number, expected in ((130, "said\n"), (1, "said\ntaken down\n")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(number)], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (number, expected, "")
