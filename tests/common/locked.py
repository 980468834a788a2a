"""A folder that another process has taken."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from itt_composer.training.run_lock import only_process


@contextmanager
def in_use(folder) -> Iterator[int]:
    """A fork holds ``folder`` until the end of the block, and is killed then; its process id."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with only_process(folder):
                os.write(write, b'.')
                signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    try:
        assert os.read(read, 1), 'the folder was not free'
        yield process
    finally:
        os.close(read)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
