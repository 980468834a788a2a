"""Send figures and histograms of callbacks to the loggers that accept them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import numpy as np
from composer.loggers import Logger, LoggerDestination, TensorboardLogger
from composer.utils import dist
from matplotlib.figure import Figure

from itt_composer.analysis.figure_style import to_array

log = logging.getLogger(__name__)


def log_picture(logger: Logger, name: str, draw: Callable[[], Figure]) -> None:
    """Log a figure from the first rank, to the loggers that accept images; draw it only if there is one."""
    takers = [d for d in logger.destinations if type(d).log_images is not LoggerDestination.log_images]
    if takers and dist.get_global_rank() == 0:
        # A wandb table calls home even offline, and hangs.
        logger.log_images(to_array(draw()), name=name, channels_last=True, use_table=False)


def log_histogram(logger: Logger, name: str, values: np.ndarray, step: int) -> None:
    """Log a histogram of the finite values from the first rank, to TensorBoard alone; without any, none."""
    if dist.get_global_rank() != 0:
        return
    for destination in logger.destinations:
        if isinstance(destination, TensorboardLogger) and destination.writer is not None:
            finite = values[np.isfinite(values)]
            if finite.size < values.size:
                _warn_not_finite(name)
            if finite.size:
                destination.writer.add_histogram(name, finite, global_step=step)


@cache
def _warn_not_finite(name: str) -> None:
    log.warning(f'{name}: expected finite values, got inf or NaN; histograms leave them out')
