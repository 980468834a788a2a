"""One process at a time in a run's folder."""

from __future__ import annotations

import os
import signal

import pytest
from common.locked import in_use
from common.shards import write_data

from itt_composer.training.run_error import RunError
from itt_composer.training.run_lock import only_process
from itt_composer.training.shared_memory import use_own_names


def fork(function) -> int:
    """Run ``function`` in a fork; its process id."""
    process = os.fork()
    if process == 0:
        try:
            function()
        finally:
            os._exit(0)
    return process


def test_a_second_start_says_who_has_the_folder(tmp_path):
    words = r'in use by process {} on .* since 20.*run_name='
    with (
        in_use(tmp_path / 'run') as first,
        pytest.raises(RunError, match=words.format(first)) as stopped,
        only_process(tmp_path / 'run'),
    ):
        pass
    assert '\n' not in str(stopped.value)
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


def test_trainings_side_by_side_use_other_names_of_shared_memory(tmp_path, monkeypatch):
    from streaming import StreamingDataset
    from streaming.base.shared import prefix

    monkeypatch.setattr(prefix, '_each_prefix_int', prefix._each_prefix_int)
    data = write_data(tmp_path / 'data', {'wiki': 8}, {'wiki': 2})
    numbers = []
    for run in ('a', 'b', 'a'):
        use_own_names(tmp_path / run)
        dataset = StreamingDataset(local=str(data / 'train/wiki'), batch_size=1)
        assert len(list(dataset)) == 8
        numbers.append(dataset._shm_prefix_int)
    # The third finds the first one's number taken, and has the next.
    assert abs(numbers[0] - numbers[1]) >= 99 and numbers[2] == numbers[0] + 1
