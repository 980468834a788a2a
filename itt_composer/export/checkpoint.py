"""Read a Composer checkpoint without the machine, the process group or the code that wrote it.

A monolithic checkpoint is one ``.pt`` file; a sharded one is a folder with ``.metadata`` and ``.distcp`` files. Both
hold the model's config and its tokenizer, so the weights are never guessed at from a training config.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from itt_composer.checks import is_file_name
from itt_composer.export.unpickle import SHARDED_INDEX, IndexReader, load_plain
from itt_composer.model.legacy import current_weight_name

LATEST, LATEST_SHARDED = 'latest-rank0.pt', 'latest-sharded-rank0'
# What a tokenizer's files end in. No code: where the export is loaded with trust_remote_code, it would run.
TOKENIZER_SUFFIXES = ('.json', '.txt', '.model', '.jinja')


@dataclass
class Checkpoint:
    """What a checkpoint holds of the model; nothing of the optimizer is read."""

    path: Path
    config: dict[str, Any]
    """``ITTConfig`` as ``config.json`` has it."""
    weights: dict[str, Tensor]
    """Parameters and buffers under the names of ``ITTForCausalLM``."""
    tokenizer: dict[str, Any]
    """Content of each of the tokenizer's files by name; empty where the run had none."""
    run_name: str | None = None
    progress: dict[str, float] = field(default_factory=dict)
    """``batch``, ``sample``, ``token`` and ``hours`` trained."""


def read_checkpoint(path: str | Path, with_weights: bool = True) -> Checkpoint:
    """Read a checkpoint; a folder of checkpoints stands for its latest.

    Args:
        path: of a ``.pt`` file, a sharded checkpoint, or a run's checkpoint folder.
        with_weights: False: of a sharded checkpoint they are not read, and ``weights`` is empty.

    Raises:
        ValueError: no checkpoint there, a damaged one, or one of another model.
    """
    wanted = ('integrations', 'run_name', 'timestamp')
    path, state = _read(path, ('model', *wanted) if with_weights else wanted)
    hugging_face = state['integrations']['huggingface']
    return Checkpoint(
        path=path,
        config=hugging_face['model']['config']['content'],
        # ComposerITTForCausalLM holds the model as .model; under DDP, itself as .module.
        weights={
            current_weight_name(name.removeprefix('module.').removeprefix('model.')): tensor
            for name, tensor in (state.get('model') or {}).items()
        },
        tokenizer={name: file['content'] for name, file in hugging_face.get('tokenizer', {}).items()},
        run_name=state['run_name'] if is_file_name(state.get('run_name')) else None,
        progress=progress_of(state.get('timestamp', {}).get('Timestamp', {})),
    )


def _read(given: str | Path, wanted: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Where the checkpoint really is, and those of its entries that are wanted, of a model of this package."""
    path = find_checkpoint(Path(given))
    try:
        state = _read_sharded(path, wanted) if path.is_dir() else _read_monolithic(path)
        hugging_face = (state.get('integrations') or {}).get('huggingface') or {}
        weights = state.get('model') or {}
        complete = bool(hugging_face) and (bool(weights) or 'model' not in wanted)
        complete = complete and all(isinstance(k, str) and isinstance(weight, Tensor) for k, weight in weights.items())
        kind = hugging_face['model']['config']['content'].get('model_type') if complete else None
        names = list(hugging_face.get('tokenizer', {}))
    except (Exception, CheckpointException) as error:  # A damaged or hostile file may raise any.
        # Of shards, what went wrong on each rank; here there is one.
        failures = error.failures.values() if isinstance(error, CheckpointException) else ()
        cause: BaseException = next((failure for failure, _ in failures), error)
        reason = ' '.join(str(cause).split())[:200]
        raise ValueError(
            f'{given}: not a complete Composer checkpoint ({type(cause).__name__}: {reason}); use another checkpoint'
        ) from None
    if not complete:
        raise ValueError(f'{given}: no model in it; use a checkpoint that Composer wrote with this package')
    if kind != 'itt':
        raise ValueError(f'{given}: expected a checkpoint of an itt_causal_lm, got model_type {kind!r}')
    for name in names:
        if not is_file_name(name) or not name.endswith(TOKENIZER_SUFFIXES):
            raise ValueError(
                f'{given}: expected tokenizer files, got one called {name!r}, which is not written; use another '
                'checkpoint'
            )
    return path, state


def find_checkpoint(path: Path) -> Path:
    """The ``.pt`` file or sharded folder that ``path`` means: itself, or the latest in a run's checkpoint folder."""
    if path.is_file() or (path / SHARDED_INDEX).is_file():
        return path.resolve()
    if not path.exists():
        scheme, remote, name = str(path).partition(':/')  # Path has dropped the second slash.
        if remote and scheme.isalnum():
            raise ValueError(
                f'{scheme}://{name}: remote checkpoints are not read here; copy it to this machine, and pass the copy'
            )
        raise ValueError(f'{path}: no such checkpoint')
    if latest := [path / name for name in (LATEST, LATEST_SHARDED) if (path / name).exists()]:
        return find_checkpoint(max(latest, key=lambda link: link.stat().st_mtime).resolve())
    raise ValueError(
        f'{path}: a folder without weights; pass a checkpoint (.pt, or a folder with {SHARDED_INDEX}), '
        'or the folder that a run saved its checkpoints in'
    )


def progress_of(values: dict[str, Any]) -> dict[str, float]:
    """``batch``, ``sample``, ``token`` and ``hours`` of the ``state_dict`` of Composer's timestamp."""
    progress = {key: values[key] for key in ('batch', 'sample', 'token') if isinstance(values.get(key), (int, float))}
    if isinstance(values.get('total_wct'), datetime.timedelta):
        progress['hours'] = values['total_wct'].total_seconds() / 3600
    return progress


def _read_monolithic(path: Path) -> dict[str, Any]:
    content = load_plain(path, mmap=True)
    return content.get('state', {}) if isinstance(content, dict) else {}


class _Planner(DefaultLoadPlanner):
    """Fills the tensors that it is given, whatever the number of ranks that wrote them, and collects ``objects``."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)
        self.objects: dict[str, Any] = {}

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Called by torch for everything that is not a tensor."""
        self.objects[read_item.dest_index.fqn] = load_plain(value)


def _read_sharded(path: Path, wanted: Sequence[str]) -> dict[str, Any]:
    reader = IndexReader(path)
    metadata = reader.read_metadata()
    keys = {key: place for key, place in metadata.planner_data.items() if place[0] == 'state' and place[1] in wanted}
    flat, planner = {key: _empty(metadata, key) for key in keys}, _Planner()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='torch.distributed is disabled')
        load(flat, storage_reader=reader, planner=planner, no_dist=True)
    flat.update(planner.objects)
    nested: dict[Any, Any] = {}
    for key, place in keys.items():
        branch = nested
        for name in place[:-1]:
            branch = branch.setdefault(name, {})
        branch[place[-1]] = flat[key]
    return _lists(nested['state'])


def _empty(metadata: Metadata, key: str) -> Tensor | None:
    item = metadata.state_dict_metadata[key]
    return torch.empty(item.size, dtype=item.properties.dtype) if isinstance(item, TensorStorageMetadata) else None


def _lists(value: Any) -> Any:
    """Dictionaries keyed 0, 1, ... back to the lists that they were."""
    if not isinstance(value, dict):
        return value
    values = {key: _lists(item) for key, item in value.items()}
    return [values[i] for i in range(len(values))] if values and all(isinstance(key, int) for key in values) else values
