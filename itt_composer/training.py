"""One training run of a resolved run file, from ``train.py`` and from a study."""

from __future__ import annotations

import os

from omegaconf import DictConfig

from itt_composer.run_manifest import write_manifest


def train(config: DictConfig) -> None:
    """Write the run's manifest and train; a run that has already reached its end is left as it is."""
    from llmfoundry.command_utils import train as foundry_train

    if os.environ.get('RANK', '0') == '0':
        write_manifest(config)
    try:
        foundry_train(config)
    except ValueError as error:
        # Composer's way to say that the checkpoint it resumed from is the last one.
        if 'No training would occur' not in str(error):
            raise
        print(
            f'{config.run_name} has already trained for {config.max_duration}; to train on, raise max_duration; '
            'to train again, set another run_name'
        )
