"""In continuous integration a skipped test fails the run unless it is listed."""

import pytest


class StrictSkips:
    """A pytest plugin that fails a session with skips that no list names.

    Each line of the list reads `<test id>: <reason>`, the reason being the one that
    pytest reports; a line that starts with `#` is a comment. A test that is expected
    to fail counts as skipped, whether it fails or not.

    Args:
        file: Path of the list.
    """

    def __init__(self, file):
        self.allowed = read(file)
        self.unlisted = {}

    def pytest_runtest_logreport(self, report):
        """Notes a skipped test."""
        if report.skipped or hasattr(report, "wasxfail"):
            self.note(report.nodeid, getattr(report, "wasxfail", None), report)

    def pytest_collectreport(self, report):
        """Notes a module that skips itself."""
        if report.skipped:
            self.note(report.nodeid, None, report)

    def note(self, name, reason, report):
        """Notes a skip unless the list has it with its reason."""
        if reason is None:
            _, _, reason = report.longrepr
            reason = reason.removeprefix("Skipped: ")
        if self.allowed.get(name) != reason:
            self.unlisted[name] = reason

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        """Fails the session."""
        if self.unlisted and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        """Says which skips are not listed."""
        if self.unlisted:
            terminalreporter.section("skips that allowed_skips.txt does not name")
            for name, reason in self.unlisted.items():
                terminalreporter.line(f"{name}: {reason}")


def read(file):
    """The listed tests and their reasons."""
    allowed = {}
    for line in file.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            name, separator, reason = line.partition(": ")
            if not separator or not reason.strip():
                raise ValueError(
                    f"expected `<test id>: <reason>` in {file}; Received {line!r}"
                )
            allowed[name.strip()] = reason.strip()
    return allowed
