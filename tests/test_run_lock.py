"""One process at a time in a run's folder."""

from __future__ import annotations

import os
import signal

import pytest

from itt_composer.training.run_error import RunError
from itt_composer.training.run_lock import only_process


def fork(function) -> int:
    """Run ``function`` in a fork; its process id."""
    process = os.fork()
    if process == 0:
        try:
            function()
        finally:
            os._exit(0)
    return process


def hold(folder, write):
    with only_process(folder):
        os.write(write, b'.')
        signal.pause()


def test_a_second_start_says_who_has_the_folder(tmp_path):
    read, write = os.pipe()
    first = fork(lambda: hold(tmp_path / 'run', write))
    assert os.read(read, 1)
    with pytest.raises(RunError, match=rf'in use by process {first} on .* since 20.*run_name=') as stopped:
        hold(tmp_path / 'run', write)
    assert '\n' not in str(stopped.value)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    with only_process(tmp_path / 'run'):  # A dead process does not keep it.
        assert f'process {os.getpid()} ' in (tmp_path / 'run' / '.lock').read_text()


def test_workers_that_outlive_a_process_do_not_keep_its_lock(tmp_path):
    read, write = os.pipe()

    def parent():
        with only_process(tmp_path):
            os.write(write, fork(signal.pause).to_bytes(4, 'little'))

    os.waitpid(fork(parent), 0)
    worker = int.from_bytes(os.read(read, 4), 'little')
    try:
        with only_process(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
