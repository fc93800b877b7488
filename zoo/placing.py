"""Puts finished folders and files in their places, whole, beside other processes.

What is not finished has a name that starts with a dot, so that no server looks at it:
`.1.partial` while version 1 is written and, for a moment on systems that cannot swap
two names at once, `.1.replaced` for the version 1 that was there before. Here are also
the rules for the names of models and versions.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
from pathlib import Path

# One path component: no separator, no leading dot (so neither `..` nor a hidden
# file), nothing that a shell, a URL or a file system reads its own way.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
# TensorFlow Serving's versions are int64, in one spelling.
VERSION = re.compile(r"0|[1-9][0-9]{0,18}")
MAX_VERSION = 2**63 - 1


def is_model_name(name):
    """Tells whether a model's folder may have a name.

    Args:
        name: Anything.

    Returns:
        Whether it is a str of at most 128 letters, digits, `_`, `.` and `-`, which does
        not start with `.` or `-` and is not a number, as versions are.
    """
    return isinstance(name, str) and bool(NAME.fullmatch(name)) and not name.isdigit()


def version_of(name):
    """Returns the version that a folder's name means.

    Args:
        name: A str.

    Returns:
        An integer from 0 to 2**63 - 1. None for any other name: one with a sign, a
        leading zero or digits of another script.
    """
    if VERSION.fullmatch(name) and int(name) <= MAX_VERSION:
        return int(name)
    return None


@contextlib.contextmanager
def locked(folder):
    """Lets one process at a time write into a model's folder, and clears it up.

    What a process that was killed has left there is removed or, where it had begun to
    replace a version, put back.

    Args:
        folder: A `pathlib.Path`, which exists.
    """
    # Not through a link that somebody has put there.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(folder / ".lock", flags, 0o666)
    try:
        # Released by the system when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        _clear(folder)
        yield
    finally:
        os.close(lock)


def place(partial, target):
    """Gives a finished folder or file its name, in one step where the system can.

    Before, it is on the disk with all its content, so that after a loss of power, too,
    the name means the whole.

    Args:
        partial: Its present path.
        target: Its path from now on, on the same file system. What is there goes.
    """
    for path in (partial, *partial.rglob("*")):
        _sync(path)
    if not partial.is_dir() or not os.path.lexists(target):
        os.replace(partial, target)
    elif exchange(partial, target):
        remove(partial)
    else:
        replaced = target.parent / f".{target.name}.replaced"
        os.rename(target, replaced)
        os.rename(partial, target)
        remove(replaced)
    _sync(target.parent)


def write(path, content):
    """Writes a file that is there whole or not at all.

    Args:
        path: Its path. What is there goes.
        content: str or bytes.
    """
    path = Path(path)
    # A name of its own for each process that writes.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    remove(partial)
    try:
        with open(partial, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        place(partial, path)
    finally:
        remove(partial)


def exchange(one, other):
    """Swaps two names at once.

    Args:
        one: A path.
        other: Another on the same file system.

    Returns:
        Whether this system and file system can do that. If not, nothing has changed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), os.fspath(other))


def remove(path):
    """Removes a folder, a file or a link; nothing there is fine.

    Args:
        path: A `pathlib.Path`.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path):
    """Has the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(folder):
    for replaced in folder.glob(".*.replaced"):
        target = folder / replaced.name[1 : -len(".replaced")]
        if not os.path.lexists(target):  # killed between the two renames of `place`
            os.rename(replaced, target)
    for leftover in (*folder.glob(".*.partial"), *folder.glob(".*.replaced")):
        remove(leftover)
