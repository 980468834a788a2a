"""One training run of a resolved training config, from ``train.py`` and from a study."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from omegaconf import DictConfig

from itt_composer.atomic import remove_leftovers
from itt_composer.config.pretrained import weights_sha256
from itt_composer.export.unpickle import check_names
from itt_composer.training.checkpoints import checkpoints, is_complete, named_batch, settle
from itt_composer.training.manifest import manifest_path, read_manifest, record_not_finite
from itt_composer.training.old_checkpoints import rename_old_weights
from itt_composer.training.resume import check_resume, is_below
from itt_composer.training.run_error import NotFiniteError, RunError
from itt_composer.training.run_lock import only_process


def train(config: DictConfig) -> None:
    """Train, or continue from the run's last checkpoint; a run that has already reached its end is left as it is.

    Args:
        config: as ``run_file.resolve`` returns it.

    Raises:
        RunError: before the training, another process has the run, or its checkpoint was trained under another config;
            during it, the loss is not finite or a signal came.
    """
    config = config.copy()
    on_purpose = bool(config.pop('resume_with_changes', False))
    # The other ranks wait for the first one in foundry's first barrier.
    path = manifest_path(config) if os.environ.get('RANK', '0') == '0' else None
    batch = None
    with only_process(path.parent) if path is not None else nullcontext():
        if path is not None:
            remove_leftovers(path.parent)
            if pretrained := config.model.get('pretrained'):
                config.variables.pretrained_weights = weights_sha256(pretrained)
            batch = _find_checkpoint(config, path, on_purpose)
        _fit(config, path, batch)


def _find_checkpoint(config: DictConfig, path: Path, on_purpose: bool) -> int | None:
    """See which checkpoint the run continues from, if any, and that it may; return its batch where that is known."""
    folder, load_path = str(config.get('save_folder') or ''), str(config.get('load_path') or '')
    manifest = read_manifest(path)
    own = bool(folder and load_path and not config.get('load_weights_only') and is_below(load_path, folder))
    if load_path and not own and '://' not in load_path:
        try:
            check_names(Path(load_path))
        except ValueError as error:
            raise RunError(f'load_path: {error}') from None
    found: Path | str | None = load_path if own else None
    if folder and (config.get('autoresume') or own):
        # What a remote folder holds is not known here; a run with a manifest may have checkpoints there.
        newest = settle(Path(folder)) if '://' not in folder else folder if manifest else None
        if config.get('autoresume') and newest:
            if own and Path(load_path).resolve() != Path(newest).resolve():
                raise RunError(
                    f'load_path: {load_path}, but the run continues from its newest checkpoint, {Path(newest).name}; '
                    'leave load_path out, or add autoresume=false'
                )
            found = newest
    if found is None:
        # Composer refuses this too, but sees no sharded checkpoints.
        if folder and '://' not in folder and checkpoints(Path(folder)) and not config.get('save_overwrite'):
            raise RunError(
                f'{folder}: has checkpoints of an earlier start; add autoresume=true or load_path= to continue from '
                'one, or set run_name='
            )
        return None
    if '://' not in str(found):
        if not is_complete(Path(found)):
            raise RunError(f'{found}: not a complete checkpoint; set load_path to another one')
        rename_old_weights(Path(found))
    changes = check_resume(manifest, config, path.parent, on_purpose)
    for key, (before, after) in changes.items():
        print(f'{config.run_name}: continues from {Path(found).name} with {key}: {after!r} instead of {before!r}')
    return named_batch(Path(found).resolve())


def _fit(config: DictConfig, path: Path | None, batch: int | None) -> None:
    from composer.core import Callback
    from llmfoundry import registry
    from llmfoundry.command_utils import train as foundry_train

    from itt_composer.training.evaluate_once import EvaluateOnce
    from itt_composer.training.finite_loss import FiniteLoss
    from itt_composer.training.fsdp import choose_fsdp
    from itt_composer.training.interruption import Interruption
    from itt_composer.training.renew_examples import renew_examples
    from itt_composer.training.run_record import RunRecord
    from itt_composer.training.shared_memory import use_own_names

    if config.get('expandable_segments', True):
        # Foundry's default, which it sets when CUDA has read the variable.
        os.environ.setdefault('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True')
    interruption = Interruption()
    ours: Mapping[str, Callback] = {
        'finite_loss': FiniteLoss(),
        'run_record': RunRecord(config, path, batch),
        'interruption': interruption,
        'evaluate_once': EvaluateOnce(),
    }
    choose_fsdp(config)
    if not config.variables.get('remote'):  # Of remote data, streaming compares the local folders of all trainings.
        use_own_names(Path(str(config.variables.get('runs') or ''), config.run_name))
    for name, callback in ours.items():
        # Foundry builds callbacks from registered classes alone; this one builds the callback that is there.
        kind = type(name, (Callback,), {'__new__': lambda _, own=callback: own, '__module__': __name__})
        registry.callbacks.register(name, func=kind)
    # First in the list, so that no other callback meets a loss that is not finite.
    config.callbacks = {**{name: {} for name in ours}, **(config.get('callbacks') or {})}
    try:
        with renew_examples():
            foundry_train(config)
    except NotFiniteError as error:
        if path is not None:
            record_not_finite(path, str(error))
        raise
    except ValueError as error:
        # Composer's way to say that the checkpoint it resumed from is the last one.
        if 'No training would occur' not in str(error):
            raise
        print(
            f'{config.run_name} has already trained for {config.max_duration}; to train longer, raise max_duration; '
            'to train again, set another run_name'
        )
    finally:
        interruption.restore()
