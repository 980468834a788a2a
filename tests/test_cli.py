"""``itt``: commands, their help, refusals and the time that they take."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from itt_composer import __version__
from itt_composer.callbacks.progress import Progress
from itt_composer.cli import COMMANDS, app
from itt_composer.config.files import find_file, names, yamls_folder

pytestmark = pytest.mark.usefixtures('elsewhere')


def itt(*arguments: str):
    return CliRunner().invoke(app, arguments, prog_name='itt', env={'COLUMNS': '200', 'TERM': 'dumb'})


def test_help_of_each_command():
    help_text = itt('--help').output
    for name in COMMANDS:
        done = itt(name, '--help')
        assert name in help_text and done.exit_code == 0 and 'Usage: itt ' in done.output
        assert itt(name, '--no-such-option').exit_code == 2
    assert '[default: 4096]' in ' '.join(itt('data', '--help').output.split())


def test_data_is_read_from_where_it_is_written():
    """`itt sweep` and `itt calibrate` without --data read the folder of `itt data` without --out."""

    def default(command, option):
        (found,) = [one for one in get_command(app).get_command(None, command).params if one.name == option]
        return found.default

    assert (
        default('data', 'out')
        == default('verify-data', 'out')
        == default('sweep', 'data')
        == default('calibrate', 'data')
    )


def test_ls_has_run_files_groups_and_studies():
    listed = itt('ls').output.split()
    assert {'itt_x4_230m', 'sft/gsm8k_itt_x2', 'parts.machine:', 'gpus', 'headline', 'gauntlet'} <= set(listed)
    assert itt('--version').output == f'{__version__}\n'


def test_a_run_file_is_found_by_name_and_by_path(tmp_path, monkeypatch):
    own = yamls_folder() / 'itt_x4_tiny.yaml'
    assert find_file('itt_x4_tiny') == find_file('itt_x4_tiny.yaml') == find_file(own) == own
    assert find_file('sft/gsm8k_dense') == yamls_folder() / 'sft' / 'gsm8k_dense.yaml'
    assert find_file('gauntlet', 'eval').is_file() and 'gauntlet' in names('eval')
    (tmp_path / 'mine.yaml').write_text('')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert find_file('~/mine.yaml') == tmp_path / 'mine.yaml' == find_file('mine.yaml').resolve()
    for wrong, nearest in (('itt_x4_tiney', 'itt_x4_tiny'), (str(tmp_path / 'mne.yaml'), 'mine.yaml')):
        with pytest.raises(ValueError, match=f'no such file.*did you mean {nearest!r}'):
            find_file(wrong)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['train', 'itt_x4_162m'], 'train: itt_x4_162m: no GPU'),
        (['validate', 'itt_x4_162m', 'model.combin=delta'], "validate: .*did you mean 'combine'"),
        (['flops', 'itt_x4_16m'], "flops: itt_x4_16m: no such file.*did you mean 'itt_x4_162m'"),
        (['eval', '--model', 'nowhere'], 'eval: nowhere: no such file or folder'),
        (['eval', '--model', '.', '--row', 'itt_x5'], "eval: row: 'itt_x5' is not one of"),
        (['calibrate', '.', '--data', '.', '--ratios', 'half'], 'calibrate: .*not numbers'),
        (['sweep', 'nowhere', '--data', '.'], 'sweep: nowhere: no such file or folder'),
        (['tokens', '.', '--text', 'x', '--selection', 'topk'], "tokens: selection: 'topk'.*did you mean 'top_k'"),
        (['verify-data', '--out', 'nowhere'], 'nowhere has no manifest.json'),
        (['export', '--checkpoint', 'nowhere', '--out', 'x'], 'export: nowhere: no such checkpoint'),
        (
            ['export', '--checkpoint', 's3://bucket/a.pt', '--out', 'x'],
            'export: s3://bucket/a.pt: remote checkpoints are not read here; copy it to this machine',
        ),
    ],
)
def test_a_refusal_is_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr('itt_composer.training.preflight._gpus_here', lambda: 0)
    done = itt(*arguments)
    assert done.exit_code == 1 and len(done.output.splitlines()) == 1
    assert re.search(message, done.output), done.output


def test_a_refusal_imports_neither_torch_nor_composer():
    """One process asks for all of them; idle, each takes under a second of it."""
    code = """
import sys
from typer.testing import CliRunner
from itt_composer.cli import app
for line in sys.stdin.read().splitlines():
    assert CliRunner().invoke(app, line.split()).exit_code, line
heavy = {'torch', 'transformers', 'composer', 'llmfoundry', 'streaming', 'lm_eval'} & set(sys.modules)
sys.exit(f'imported {heavy}' if heavy else 0)
"""
    lines = ['train itt_x4_162m', 'data --out x --nonsense', 'verify-data --out nowhere', 'eval --model nowhere',
             'calibrate nowhere --data . --ratios 0.5', 'sweep nowhere --data .', 'tokens nowhere --text x',
             'export --out x', 'flops nowhere', 'validate nowhere', 'nonsense']  # fmt: skip
    done = subprocess.run([sys.executable, '-c', code], input='\n'.join(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert f'{tmp_path}/none has no manifest.json' in itt('verify-data', '--out=~/none').output
    assert f' {tmp_path}/none/tokenizer' in itt('train', 'llama_tiny', 'variables.data=~/none').output


@pytest.mark.parametrize(('command', 'words'), [('train', 'stopped; the same command continues'), ('flops', 'stopped')])
def test_ctrl_c_is_one_line_and_130(command, words, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr('itt_composer.training.command.resolve', interrupted)
    monkeypatch.setattr('itt_composer.cli.resolve_model', interrupted)
    done = itt(command, 'itt_x4_162m')
    assert (done.exit_code, done.output.strip()) == (130, words)


def test_several_processes_are_the_launchers(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr('itt_composer.training.command.checked', lambda *_, **__: (None, SimpleNamespace(local_rank=0)))
    monkeypatch.setattr('os.execv', lambda program, command: started.append(command))
    assert itt('train', 'itt_x4_162m', '-n', '8', 'max_duration=1ba', '--verbose').exit_code == 0
    (command,) = started
    assert (
        command[1:8] == ['-m', 'itt_composer.training.launcher', '-n', '8', '-m', 'itt_composer', 'train']
        and '--verbose' in command
    )
    assert 'max_duration=1ba' in command and command[8] == 'itt_x4_162m'


def test_progress_has_loss_and_time_left(monkeypatch, capsys):
    from common.tiny_runs import fit, tiny_model

    from research.quickstart import command as quickstart

    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, 'monotonic', lambda: float(next(clock)))
    logged = fit(tiny_model(), [Progress('2ba')])
    lines = [line for line in capsys.readouterr().out.splitlines() if 'left' in line]
    monkeypatch.undo()
    assert [line.split()[0] for line in lines] == [
        '[batch=1/8]',
        '[batch=2/8]',
        '[batch=4/8]',
        '[batch=6/8]',
        '[batch=8/8]',
    ]
    losses = dict(logged['loss/train/total'])
    # 10 s after the start, one of eight batches is done; 20 s after it, two.
    # The quickstart reads these lines.
    assert [quickstart.BATCH.findall(line) for line in lines[:2]] == [[('1', '8')], [('2', '8')]]
    assert quickstart.LOSS.findall(lines[0]) == [f'{losses[0]:.4f}']
    assert lines[0] == f'[batch=1/8] loss {losses[0]:.4f}, 10 s per batch, 70 s left'
    assert lines[1] == f'[batch=2/8] loss {losses[1]:.4f}, 10 s per batch, 60 s left'
    assert lines[-1].endswith(', 0 s left')
