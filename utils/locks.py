"""Locks between processes, where the file system has them: some that clusters share have none."""

import errno

from filelock import FileLock, SoftFileLock

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def lock_if_possible(lock: FileLock, timeout: float = -1) -> bool:
    """Acquire a lock; False where the file system has none.

    Args:
        timeout: seconds to wait while another process holds it; -1: as long as it takes.

    Raises:
        filelock.Timeout: another process holds it.
    """
    try:
        lock.acquire(timeout=timeout)
    except NotImplementedError:
        return False
    except OSError as error:                                # a Timeout too, which has no number
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def if_left_behind(lock: FileLock) -> str:
    """What to add to an error about a held lock. Where flock is missing, filelock may make do with a file, which a process that is killed
    on another host leaves behind."""
    return f". If none is, delete {lock.lock_file}" if isinstance(lock, SoftFileLock) else ""
