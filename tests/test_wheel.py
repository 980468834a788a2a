"""The wheel, outside the checkout: the commands of a first day, in one process because composer's import is slow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from itt_composer import __version__

SOURCES = ('itt_composer', 'data_prep', 'yamls', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE')
SMALL = (
    'max_seq_len=128 model.hidden_size=32 model.num_attention_heads=4 model.num_key_value_heads=4 '
    'model.intermediate_size=48 model.num_hidden_layers=2 global_train_batch_size=4 max_duration=2ba '
    'eval_interval=2ba save_interval=2ba console_log_interval=1ba variables.data=data'
)
COMMANDS = f"""
ls
flops itt_x4_162m
data --source text --seq-len 128 --validation-tokens 2000 --workers 1
verify-data --workers 1
validate itt_x4_tiny {SMALL}
train itt_x4_tiny {SMALL}
export --checkpoint runs/itt_x4_tiny/checkpoints --out exported
eval-data
eval --model exported --eval-data eval_data --limit 2
tokens exported --text a_word --out tokens.html
"""
DRIVER = """
import sys
from itt_composer.cli import app
for line in sys.stdin.read().split('\\n'):
    if line:
        print('$ itt', line, flush=True)
        app(line.split(), standalone_mode=False)
"""


@pytest.fixture(scope='module')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files in a folder, as pip installs them."""
    source, wheels, site = (tmp_path_factory.mktemp('wheel') / name for name in ('source', 'wheels', 'site'))
    for name in SOURCES:
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            source.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, source)
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    build = [*pip, 'wheel', '--no-deps', '--no-build-isolation', '--no-index', '--wheel-dir', str(wheels), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = wheels.glob('*.whl')
    subprocess.run([*pip, 'install', '--no-deps', '--no-index', '--target', str(site), str(wheel)], check=True)
    return site


def write_texts(folder: Path) -> None:
    words = 'the model reads a text word by word and thinks longer about hard ones'.split()  # noqa: SIM905
    for domain in ('books', 'wiki'):
        (folder / 'text' / domain).mkdir(parents=True)
        lines = (json.dumps({'text': ' '.join(words[i % 7 :] * 20)}) for i in range(60))
        (folder / 'text' / domain / 'a.jsonl').write_text('\n'.join(lines))
    (folder / 'eval_data' / 'piqa').mkdir(parents=True)
    document = {'goal': 'read', 'sol1': 'word by word', 'sol2': 'a text', 'label': 0}
    (folder / 'eval_data' / 'piqa' / 'test.jsonl').write_text(f'{json.dumps(document)}\n' * 3)


def test_commands_outside_the_checkout(site, tmp_path):
    write_texts(tmp_path)
    # A repository of another project, whose commit is not this project's.
    commit = ['-c', 'user.name=x', '-c', 'user.email=x@x', 'commit', '-q', '--allow-empty', '-m', 'another project']
    for git in (['init', '-q'], commit):
        subprocess.run(['git', *git], cwd=tmp_path, check=True)
    environment = {**os.environ, 'PYTHONPATH': str(site), 'COLUMNS': '200'}
    script = subprocess.run(
        [site / 'bin' / 'itt', '--version'], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert script.stdout == f'{__version__}\n' and not (site / 'bin' / 'lm_eval').exists()

    done = subprocess.run(
        [sys.executable, '-c', DRIVER], input=COMMANDS, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f'{done.stdout[-3000:]}\n{done.stderr[-5000:]}'
    outputs = {part.split(maxsplit=1)[0]: part for part in done.stdout.split('$ itt ')[1:]}
    assert 'itt_x4_230m' in outputs['ls'] and str(site) in outputs['ls']
    assert '"parameters": 162' in outputs['flops']
    assert 'valid; it trains for 2ba' in outputs['validate']
    before, _, after = outputs['train'].partition('[batch=1/2] loss ')
    assert after and len(before.splitlines()) < 60, outputs['train']
    assert '[batch=2/2] loss ' in after and 'Config:' not in outputs['train']
    manifest = json.loads((tmp_path / 'runs' / 'itt_x4_tiny' / 'manifest.json').read_text())
    assert manifest['environment']['revision'] == __version__
    assert (tmp_path / 'exported' / 'model.safetensors').is_file()
    assert 'piqa' in outputs['eval'] and list(tmp_path.glob('eval_results/*/table1.csv'))
    assert 'extra steps each' in outputs['tokens'] and 'ITT x4' in (tmp_path / 'tokens.html').read_text()
