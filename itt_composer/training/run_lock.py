"""One process at a time in a folder. The lock is the kernel's, so that a process that died does not keep it."""

from __future__ import annotations

import datetime
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from itt_composer.training.run_error import RunError

LOCK = '.lock'

log = logging.getLogger(__name__)


@contextmanager
def only_process(folder: Path, way_out: str = 'set run_name= to train another run') -> Iterator[None]:
    """Hold ``folder`` while the block runs. The file ``.lock`` in it stays, and says who holds or held it.

    Args:
        folder: made if it is missing.
        way_out: what to do where another process has it, beside waiting.

    Raises:
        RunError: another process holds it; says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, 'a+', encoding='utf-8') as file:
        try:
            # Of this process alone: its forks (data loaders' workers) do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                # A file system without locks.
                log.warning('%s: cannot be locked (%s); a second start would not be noticed', folder, error)
            else:
                file.seek(0)
                holder = file.read().strip() or 'a process that has just started'
                raise RunError(f'{folder}: in use by {holder}; wait for its end, or {way_out}') from None
        file.truncate(0)
        since = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
        file.write(f'process {os.getpid()} on {socket.gethostname()} since {since}')
        file.flush()
        yield
