"""A run that was killed while it wrote a checkpoint goes on from the one before.

Composer writes a checkpoint under its final name and then turns the link to the latest one to it. Started again, it
would load the one before and refuse to go on beside the part of the other.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from pathlib import Path

CHECKPOINT = re.compile(r'ep\d+-ba(\d+)-rank0\.pt')
LATEST = 'latest-rank0.pt'

log = logging.getLogger(__name__)


def clear_unfinished(folder: Path) -> None:
    """Remove what is not a whole checkpoint, and turn the link to the latest one that is.

    Args:
        folder: a run's checkpoints, monolithic ones; those in shards are written over as they are.
    """
    whole: dict[int, Path] = {}
    for file in folder.glob('*-rank0.pt'):
        match = CHECKPOINT.fullmatch(file.name)
        if match is None:
            continue
        # PyTorch's file is a zip archive, whose list of contents comes last.
        if zipfile.is_zipfile(file):
            whole[int(match[1])] = file
        else:
            log.warning('%s is not whole, so the run ended while it was written; it is removed', file)
            file.unlink()
    link = folder / LATEST
    if whole and (link.is_symlink() or not link.exists()):
        latest = whole[max(whole)]
        if not link.exists() or link.resolve() != latest.resolve():
            partial = link.with_name(f'{LATEST}.partial')
            partial.unlink(missing_ok=True)
            partial.symlink_to(latest.name)
            os.replace(partial, link)
