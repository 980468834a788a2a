"""The way of the callbacks' pictures and histograms to the loggers that take them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from composer.loggers import Logger, LoggerDestination, TensorboardLogger
from composer.utils import dist
from matplotlib.figure import Figure

from itt_composer.analysis.figure_style import to_array


def log_picture(logger: Logger, name: str, draw: Callable[[], Figure]) -> None:
    """Give a picture to the loggers that take one, from the first rank only; draw it only if there is such a logger."""
    takers = [d for d in logger.destinations if type(d).log_images is not LoggerDestination.log_images]
    if takers and dist.get_global_rank() == 0:
        # A wandb table calls home even offline, and hangs.
        logger.log_images(to_array(draw()), name=name, channels_last=True, use_table=False)


def log_histogram(logger: Logger, name: str, values: np.ndarray, step: int) -> None:
    """Give the finite values to TensorBoard, the only logger that takes a histogram, from the first rank only."""
    values = values[np.isfinite(values)]
    if dist.get_global_rank() != 0 or not values.size:
        return
    for destination in logger.destinations:
        if isinstance(destination, TensorboardLogger) and destination.writer is not None:
            destination.writer.add_histogram(name, values, global_step=step)
