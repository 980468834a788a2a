"""``itt train``: what it says where a run cannot start, and a real run through foundry to its end and beyond."""

from __future__ import annotations

from pathlib import Path

import pytest
from common.shards import write_data
from omegaconf import OmegaConf

from itt_composer.cli import app
from itt_composer.config.run_file import resolve
from itt_composer.training import command, manifest
from itt_composer.training.preflight import Machine, problems

REPOSITORY = Path(__file__).resolve().parents[1]
YAMLS = REPOSITORY / 'yamls'
ITT = str(YAMLS / 'itt_x4_162m.yaml')


def itt_train(arguments: list[str]) -> None:
    app(['train', *arguments], standalone_mode=False)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp('data'), {'arxiv': 64, 'wiki': 32}, {'arxiv': 4, 'wiki': 4})


def machine(gpus: int = 0, processes: int = 1, world: int | None = None, local_rank: int = 0) -> Machine:
    return Machine(world_size=world or processes, local_world_size=processes, local_rank=local_rank, gpus=gpus)


@pytest.fixture
def paper_config(data):
    """The paper's training config on data that is there."""
    overrides = [f'variables.data={data}', 'variables.proportions=null', 'max_seq_len=32']
    return lambda *more: resolve(ITT, [*overrides, *more])


TRITON = 'parts.machine=cpu model.attention_backend=triton'
CHECKPOINTING = 'fsdp_config.activation_checkpointing=true'


@pytest.mark.parametrize(
    ('overrides', 'here', 'problem'),
    [
        ('', dict(gpus=8, processes=8), ''),
        ('', dict(gpus=8, processes=8, world=64), ''),
        ('parts.machine=cpu', dict(), ''),
        ('', dict(), 'no GPU here, and the training config needs precision amp_bf16; add: parts.machine=cpu'),
        (TRITON, dict(), 'no GPU here, and model.attention_backend is triton; add: model.attention_backend=auto'),
        (TRITON, dict(gpus=1), ''),
        (CHECKPOINTING, dict(gpus=1), 'fsdp_config.activation_checkpointing: has no effect with one process'),
        (CHECKPOINTING, dict(gpus=8, processes=8), ''),
        # One process runs without FSDP, and FSDP 2 runs on a CPU.
        ('precision=fp32 fsdp_config.version=1', dict(processes=2), 'needs FSDP 1; add'),
        ('precision=fp32 fsdp_config.version=1', dict(), ''),
        ('precision=fp32', dict(processes=2), ''),
        ('', dict(gpus=4, processes=8), '8 processes on a machine with 4 GPUs; start 4: composer -n 4'),
        ('global_train_batch_size=256', dict(gpus=8, processes=8, world=7), 'add: global_train_batch_size=252'),
        ('global_train_batch_size=2', dict(gpus=8, processes=8), 'add: global_train_batch_size=8'),
    ],
)
def test_what_a_machine_cannot_do(paper_config, overrides, here, problem):
    found = problems(paper_config(*overrides.split()), machine(**here))
    assert len(found) == bool(problem) and all(problem in one for one in found), found


def test_no_shards_and_no_tokenizer(data, tmp_path):
    (problem,) = problems(resolve(ITT, [f'variables.data={tmp_path / "none"}']), machine(gpus=1))
    assert 'no shards at' in problem and f'itt data --source <text> --out {tmp_path / "none"}' in problem
    remote = [
        'variables.remote=s3://bucket/data',
        f'variables.data={tmp_path}',
        'train_loader.dataset.epoch_size=25600',
    ]
    assert problems(resolve(ITT, remote), machine(gpus=1)) == []
    config = resolve(ITT, [f'variables.data={data}', 'variables.proportions=null', 'max_seq_len=32'])
    for name in (str(tmp_path / 'tokenizer'), './tokenizer', 'data/redpajama/tokenizer'):
        config.tokenizer.name = name
        (problem,) = problems(config, machine(gpus=1))
        assert 'no tokenizer' in problem
    config.tokenizer.name = 'huggyllama/llama-7b'  # On the hub.
    assert problems(config, machine(gpus=1)) == []


def test_one_line_and_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command.Machine, 'here', lambda: machine())
    for arguments, words in (
        ([ITT, f'variables.data={tmp_path / "none"}'], ['no GPU', 'no shards']),
        ([ITT, 'model.combin=delta'], ["did you mean 'combine'"]),
        (['yamls/none.yaml'], ['no such file']),
    ):
        with pytest.raises(SystemExit) as stopped:
            itt_train(arguments)
        # A message as the code: the interpreter prints it to stderr and exits with 1.
        assert str(stopped.value.code).startswith('train: ') and '\n' not in stopped.value.code
        assert all(word in stopped.value.code for word in words)
    assert capsys.readouterr().out == ''


def test_other_ranks_leave_the_word_to_the_first(monkeypatch):
    waited = []
    monkeypatch.setattr(command.time, 'sleep', waited.append)
    with pytest.raises(SystemExit) as stopped:
        command.stop('no', machine(processes=2, local_rank=1))
    assert stopped.value.code == 'train: no' and waited, 'printed, if the first one has not ended all by then'


def test_print_config_is_the_config(data, capsys):
    overrides = [f'variables.data={data}', 'variables.proportions=null', 'max_seq_len=32']
    itt_train([ITT, '--print-config', *overrides])
    assert OmegaConf.create(capsys.readouterr().out) == resolve(ITT, overrides)


def test_a_run_goes_on_from_its_last_whole_checkpoint_and_not_beyond_its_end(data, tmp_path, capsys, monkeypatch):
    import torch

    small = ['max_seq_len=32', 'global_train_batch_size=4', 'model.hidden_size=32', 'model.num_hidden_layers=2']
    small += ['max_duration=4ba', 'save_interval=2ba', 'save_num_checkpoints_to_keep=-1', 'log_to_console=false']
    small += ['callbacks.router_weights=null', 'callbacks.step_encodings=null', 'run_name=r']
    arguments = [str(YAMLS / 'itt_x4_tiny.yaml'), *small, f'variables.data={data}', f'variables.runs={tmp_path}']
    last = tmp_path / 'r' / 'checkpoints' / 'latest-rank0.pt'

    def weights() -> dict[str, torch.Tensor]:
        return torch.load(last, weights_only=False)['state']['model']

    itt_train(arguments)
    undisturbed = weights()
    # Killed while the checkpoint was written, and before the link was turned to it.
    whole, newest = (last.with_name(f'ep0-ba{batch}-rank0.pt') for batch in (2, 4))
    newest.write_bytes(newest.read_bytes()[:5000])
    last.unlink()
    before = whole.stat().st_mtime_ns
    itt_train(arguments)
    assert whole.stat().st_mtime_ns == before, 'trained anew'
    resumed = weights()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)

    written = (tmp_path / 'r' / 'manifest.json').read_text()
    monkeypatch.setattr(manifest, 'revision', lambda: 'another')
    itt_train(arguments)
    # It still says on what it was trained.
    assert (tmp_path / 'r' / 'manifest.json').read_text() == written
    assert 'r has already trained for 4ba' in capsys.readouterr().out
    assert list((tmp_path / 'tensorboard').iterdir())


def test_a_checkpoint_to_start_from_is_there_before_the_long_imports(tmp_path, paper_config):
    for name in ('a.pt', 'ep1-rank0.pt'):
        (tmp_path / name).touch()
    refusal = 'load_path: no checkpoint at {}; set a .pt file or the folder of a sharded checkpoint'
    for path, found in (
        (tmp_path / 'b.pt', [refusal.format(tmp_path / 'b.pt')]),
        (tmp_path / 'ep2-rank{rank}.pt', [refusal.format(tmp_path / 'ep2-rank0.pt')]),
        *((path, []) for path in (tmp_path / 'a.pt', tmp_path, tmp_path / 'ep1-rank{rank}.pt', 's3://bucket/b.pt')),
    ):
        assert problems(paper_config('parts.machine=cpu', f'load_path={path}'), machine()) == found
