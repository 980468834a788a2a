"""The make targets: what they call, and what they refuse. Nothing is run but make and a shell."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess

import pytest
from conftest import REPO


def make(*arguments: str, folder=REPO, **environment: str):
    return subprocess.run(
        ['make', '-n', '--no-print-directory', *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def command(tmp_path):
    """The words of the last command that a target runs, as a shell reads them; in a folder with a blank and a quote."""
    folder = tmp_path / "o'neil's project"
    folder.mkdir()
    for name in ('Makefile', 'setup.py', 'requirements.lock'):
        shutil.copy(REPO / name, folder)
    (folder / '.venv').mkdir()
    (folder / '.venv' / '.installed').write_text('')

    def words(*arguments: str, **environment: str) -> list[str]:
        done = make(*arguments, folder=folder, **environment)
        assert done.returncode == 0, done.stderr
        subprocess.run(['sh', '-n'], input=done.stdout, text=True, check=True)
        return shlex.split(done.stdout)

    return words


def test_variables_are_options_as_they_were_typed(command):
    assert command('data') == ['.venv/bin/python', '-m', 'itt_composer', 'data']
    odd = '/data/o\'neil/$HOME/$(X) "y"'
    assert set(command('data', f'SOURCE={odd}', 'SEQ_LEN=256')[4:]) == {'--source', odd, '--seq-len', '256'}
    assert command('see', 'MODEL=a b', "TEXT=it's $5")[3:] == ['tokens', 'a b', '--text', "it's $5"]
    assert command('eval', 'MODEL=a $b')[3:] == ['eval', '--model', 'a', '--model', '$b']
    assert command('sweep', 'MODEL=m', 'RATIOS=0.5 0.7')[3:] == ['sweep', 'm', '--ratios', '0.5', '--ratios', '0.7']
    assert command('export', 'CHECKPOINT=c', 'OVERWRITE=1')[3:] == ['export', '--checkpoint', 'c', '--overwrite']
    assert command('study', 'STUDY=headline', 'SET=seeds=[17] x=1')[4:] == ['headline', 'seeds=[17]', 'x=1']


def test_the_environment_is_not_read(command):
    assert command('data', SOURCE='/x', OUT='/y', LIMIT='3') == command('data')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['data', 'SOURC=x'], 'unknown variable SOURC; known are SOURCE OUT '),
        (['test', 'LIMIT=1'], 'unknown variable LIMIT; known are none'),
        (['calibrate', 'RATIOS=0.5'], 'MODEL= is missing'),
    ],
)
def test_a_wrong_variable_is_refused(arguments, message):
    done = make(*arguments)
    assert done.returncode and message in done.stderr


def test_setup_in_a_folder_with_a_blank(tmp_path):
    """With stand-ins for python and uv, which do nothing."""
    folder = tmp_path / 'my project'
    (folder / '.venv' / 'bin').mkdir(parents=True)
    for name in ('Makefile', 'setup.py', 'requirements.lock'):
        shutil.copy(REPO / name, folder)
    for name in ('python', 'uv'):
        (folder / '.venv' / 'bin' / name).write_text('#!/bin/sh\nexit 0\n')
        (folder / '.venv' / 'bin' / name).chmod(0o755)
    subprocess.run(['make', 'setup'], cwd=folder, check=True, capture_output=True)
    assert (folder / '.venv' / '.installed').is_file()
