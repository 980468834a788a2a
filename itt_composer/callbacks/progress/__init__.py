"""One line per interval: batch, loss, speed and the time left."""

from __future__ import annotations

from itt_composer.callbacks.progress.progress import Progress

__all__ = ['Progress']
