"""Puts finished folders in their places, whole, among processes that do the same.

What is not finished has a name that starts with a dot, so that no server looks at it:
`.1.partial` while version 1 is written and, for a moment on systems that cannot swap
two names at once, `.1.replaced` for the version 1 that was there before.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil


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
    """Gives a finished folder its name, in one step where the system can.

    Args:
        partial: The folder's present path.
        target: Its path from now on, beside the present one. What is there goes.
    """
    if not os.path.lexists(target):
        os.rename(partial, target)
    elif exchange(partial, target):
        remove(partial)
    else:
        replaced = target.parent / f".{target.name}.replaced"
        os.rename(target, replaced)
        os.rename(partial, target)
        remove(replaced)


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


def _clear(folder):
    for replaced in folder.glob(".*.replaced"):
        target = folder / replaced.name[1 : -len(".replaced")]
        if not os.path.lexists(target):  # killed between the two renames of `place`
            os.rename(replaced, target)
    for leftover in (*folder.glob(".*.partial"), *folder.glob(".*.replaced")):
        remove(leftover)
