"""One training run of a resolved run file, from ``train.py`` and from a study."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig

from itt_composer.atomic import write_text
from itt_composer.training.checkpoints import clear_unfinished
from itt_composer.training.manifest import manifest_path, write_manifest


def train(config: DictConfig) -> None:
    """Write the run's manifest and train; a run that has already reached its end is left as it is."""
    from llmfoundry.command_utils import train as foundry_train

    if config.get('expandable_segments', True):
        # Foundry's default, which it sets when CUDA has read the variable.
        os.environ.setdefault('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True')
    path = manifest_path(config) if os.environ.get('RANK', '0') == '0' else None
    folder = str(config.get('save_folder') or '')
    if path is not None and config.get('autoresume') and folder and '://' not in folder:
        clear_unfinished(Path(folder))
    before = path.read_text() if path is not None and path.is_file() else None
    if path is not None:
        write_manifest(config, path)
    try:
        foundry_train(config)
    except ValueError as error:
        # Composer's way to say that the checkpoint it resumed from is the last one.
        if 'No training would occur' not in str(error):
            raise
        if path is not None and before is not None:
            write_text(before, path)
        print(
            f'{config.run_name} has already trained for {config.max_duration}; to train on, raise max_duration; '
            'to train again, set another run_name'
        )
