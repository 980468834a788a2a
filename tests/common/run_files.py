"""Where the training configs are, data and overrides that fit the tiny ones, and the message of one that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.shards import write_data
from itt_composer.config.run_file import resolve

YAMLS = Path(__file__).resolve().parents[2] / 'yamls'


def two_domains(folder: Path) -> Path:
    """Two domains, of which one has no validation rows."""
    return write_data(folder, {'arxiv': 96, 'wiki': 32}, {'arxiv': 5})


def tiny_overrides(data: Path, runs: Path) -> list[str]:
    """Overrides that fit a tiny training config to ``two_domains``."""
    return [f'variables.data={data}', f'variables.runs={runs}', 'max_seq_len=32']


def resolve_error(name: str, *overrides: str) -> str:
    """The message, of one line, with which a training config is refused."""
    with pytest.raises(ValueError) as error:
        resolve(YAMLS / f'{name}.yaml', overrides)
    message = str(error.value)
    assert '\n' not in message
    return message
