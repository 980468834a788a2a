"""Composer's ``wandb`` logger, with which a run also starts, and resumes, where W&B is offline."""

from __future__ import annotations

import os
from typing import Any

from composer.loggers import WandBLogger


class OfflineWandBLogger(WandBLogger):
    """Registered as ``wandb``; the arguments are Composer's.

    With ``autoresume``, Composer asks each logger for the latest checkpoint where there is none on the disk. W&B has
    one only of a run that logged artifacts to its server.
    """

    def download_file(self, remote_file_name: str, destination: str, *args: Any, **kwargs: Any) -> None:
        """Download an artifact; a FileNotFoundError, as for one that is missing, where W&B cannot have it."""
        offline = os.environ.get('WANDB_MODE') in ('offline', 'dryrun', 'disabled')
        if offline or not self._log_artifacts:
            raise FileNotFoundError(f'{remote_file_name}: W&B is offline, or this run logs no artifacts there')
        super().download_file(remote_file_name, destination, *args, **kwargs)
