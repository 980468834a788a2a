"""Composer checkpoints of version 0.1, brought to the names of today before they are resumed. For one release."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

from itt_composer.atomic import write_bytes
from itt_composer.export.unpickle import SHARDED_INDEX
from itt_composer.model.legacy import current_weight_name
from itt_composer.training.run_error import RunError

_OLD_NAME = re.compile(rb'\blayers\.\d+\.f\.')


def rename_old_weights(checkpoint: Path) -> None:
    """Give weights and optimizer states the name ``block`` where they have its old name ``f``.

    Raises:
        RunError: for a sharded checkpoint with old names, which is not rewritten.
    """
    if checkpoint.is_dir():
        if _OLD_NAME.search((checkpoint / SHARDED_INDEX).read_bytes()):
            raise RunError(
                f'{checkpoint}: sharded, and saved by version 0.1, which this version cannot resume; resume it with '
                'that version, or set run_name='
            )
        return
    with zipfile.ZipFile(checkpoint) as archive:
        names = next(name for name in archive.namelist() if name.endswith('data.pkl'))
        if not _OLD_NAME.search(archive.read(names)):
            return
    import torch

    # The run's own file, which Composer is about to load in the same way.
    content = torch.load(checkpoint, map_location='cpu', weights_only=False)
    renamed = io.BytesIO()
    torch.save(_renamed(content), renamed)
    write_bytes(renamed.getvalue(), checkpoint)


def _renamed(part: Any) -> Any:
    if isinstance(part, dict):
        return type(part)((_renamed(key), _renamed(value)) for key, value in part.items())
    if isinstance(part, list):
        return [_renamed(value) for value in part]
    return current_weight_name(part) if isinstance(part, str) else part
