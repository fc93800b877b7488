import os
import subprocess
import sys

import pytest

from kzoo.zoo.native_log import native_log_to

CODE = """
import os, sys
from kzoo.zoo.native_log import native_log_to
with native_log_to({path!r}):
    os.write(2, b"native\\n")
    print("python", file=sys.stderr)
    os.system("echo child >&2")
os.write(2, b"after\\n")
print("end", file=sys.stderr)
with native_log_to({path!r}):
    os.write(2, b"again\\n")
    raise ValueError("shown")
"""


def test_only_native_lines_go_to_the_file(tmp_path):
    path = str(tmp_path / "log")
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(path=path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (tmp_path / "log").read_text() == "native\nchild\nagain\n"
    first, rest = done.stderr.split("Traceback", 1)
    assert first == "python\nafter\nend\n"
    assert rest.endswith("ValueError: shown\n")


def test_it_puts_everything_back(tmp_path, capfd):
    before = sys.stderr
    with pytest.raises(KeyboardInterrupt):
        with native_log_to(tmp_path / "log"):
            os.write(2, b"hidden\n")
            raise KeyboardInterrupt
    assert sys.stderr is before
    os.write(2, b"seen\n")
    assert capfd.readouterr().err == "seen\n"
    assert (tmp_path / "log").read_text() == "hidden\n"
