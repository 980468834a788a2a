"""A run's checkpoints on disk: which of them can be resumed, and what a killed run left half-written.

Composer writes a checkpoint under its final name, turns the link to the latest one to it, and loads whatever that link
names. Here the link is turned to the newest checkpoint that is complete, undamaged and finite.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import zipfile
from io import BytesIO
from pathlib import Path

import torch

from itt_composer.export.checkpoint import LATEST, LATEST_SHARDED, read_checkpoint
from itt_composer.export.unpickle import SHARDED_INDEX, IndexReader
from itt_composer.training.run_error import RunError

_NAME = re.compile(r'ep\d+-ba(\d+)(-rank0\.pt)?')

log = logging.getLogger(__name__)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, files or sharded folders, the oldest first."""
    return sorted((path for path in folder.glob('ep*') if _NAME.fullmatch(path.name)), key=batch_of)


def batch_of(checkpoint: Path) -> int:
    """Batches trained when it was written."""
    batch = named_batch(checkpoint)
    assert batch is not None
    return batch


def named_batch(checkpoint: Path) -> int | None:
    """The same of any path; None where its name is not that of a checkpoint."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def settle(folder: Path) -> Path | None:
    """Turn the link to the newest checkpoint that can be resumed, and take those after it out of the way.

    A half-written checkpoint is removed; a damaged one, or one with weights that are not finite, is renamed to
    ``damaged-<name>``. To be called by the process that holds the run's lock.

    Args:
        folder: a run's checkpoints.

    Returns:
        That checkpoint; None where the run has none.

    Raises:
        RunError: there are checkpoints, and none can be resumed.
    """
    for leftover in [*folder.glob('._signal_file_node*'), *folder.glob('latest-*.partial')]:
        leftover.unlink()
    faulty: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints(folder)):
        if not is_complete(checkpoint):
            log.warning('%s: incomplete, because the run ended while it was written; it is removed', checkpoint)
            shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
        elif fault := _fault(checkpoint):
            faulty[checkpoint] = fault
        else:
            for other, fault in faulty.items():
                print(f'{other}: {fault}; the run continues from {checkpoint.name}, the one before')
                damaged = other.with_name(f'damaged-{other.name}')
                if damaged.is_dir():
                    shutil.rmtree(damaged)
                os.replace(other, damaged)
            _turn_link(folder, checkpoint)
            return checkpoint
    if faulty:
        checkpoint, fault = next(iter(faulty.items()))
        raise RunError(
            f'{checkpoint}: {fault}, and there is no earlier checkpoint; '
            'remove it to train from the first batch, or set run_name='
        )
    for link in (folder / LATEST, folder / LATEST_SHARDED):
        if link.exists():
            return link  # downloaded by a logger, or to a file with the name that save_filename gives
        link.unlink(missing_ok=True)
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether it was written to its end: the list of contents comes last, in a zip archive as in a sharded folder."""
    return (checkpoint / SHARDED_INDEX).is_file() if checkpoint.is_dir() else zipfile.is_zipfile(checkpoint)


def _fault(checkpoint: Path) -> str | None:
    """Why it cannot be resumed; None where it can. PyTorch's own reader checks no sums."""
    try:
        if not (_is_undamaged_folder(checkpoint) if checkpoint.is_dir() else _is_undamaged(checkpoint)):
            return 'damaged, its sums do not match'
        weights = read_checkpoint(checkpoint).weights
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        return f'damaged ({error})'
    broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    return f'weights that are not finite ({broken[0]})' if broken else None


def _is_undamaged(archive: Path | BytesIO) -> bool:
    with zipfile.ZipFile(archive) as file:
        return file.testzip() is None


def _is_undamaged_folder(checkpoint: Path) -> bool:
    """Each tensor of a sharded checkpoint is an archive of its own within a file."""
    for place in IndexReader(checkpoint).read_metadata().storage_data.values():
        with open(checkpoint / place.relative_path, 'rb') as file:
            file.seek(place.offset)
            part = file.read(place.length)
        if len(part) != place.length or not _is_undamaged(BytesIO(part)):
            return False
    return True


def _turn_link(folder: Path, checkpoint: Path) -> None:
    link = folder / (LATEST_SHARDED if checkpoint.is_dir() else LATEST)
    if link.resolve() == checkpoint.resolve() or (link.exists() and not link.is_symlink()):
        return
    partial = link.with_name(f'{link.name}.partial')
    partial.symlink_to(checkpoint.name)
    os.replace(partial, link)
