"""Composer's launcher, which passes SIGTERM on to the ranks and waits until they have saved a checkpoint.

Composer's own dies of SIGTERM, while the ranks train on, and after Ctrl-C it kills them within 30 seconds. These 30
seconds stay for ranks that wait for one that has failed.
"""

from __future__ import annotations

import datetime
import signal
import sys
from types import FrameType

from composer.cli import launcher

# An evaluation comes to its end before the checkpoint is saved.
SAVING = datetime.timedelta(minutes=30)


def _end(number: int, frame: FrameType | None) -> None:
    launcher.CLEANUP_TIMEOUT = SAVING
    raise KeyboardInterrupt


if __name__ == '__main__':
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    sys.exit(launcher.main())
