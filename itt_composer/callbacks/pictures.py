"""What the callbacks' pictures share: colours told apart in print and by everyone, arrays, the way to the loggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from composer.loggers import Logger, LoggerDestination, TensorboardLogger
from composer.utils import dist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, darkest first: told apart with every common colour blindness, and in grey by marker and dash.
COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
DASHES = ('-', '--', '-.', ':')


def line_style(i: int) -> dict[str, Any]:
    """Colour, marker and dash of a picture's i-th line; 28 lines before two of them look alike."""
    return {
        'color': COLOURS[i % len(COLOURS)],
        'marker': MARKERS[i % len(MARKERS)],
        'linestyle': DASHES[i // len(COLOURS) % len(DASHES)],
    }


def to_array(figure: Figure) -> np.ndarray:
    """The figure as pixels, uint8 [H, W, 3], drawn without pyplot and its global state."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def log_picture(logger: Logger, name: str, draw: Callable[[], np.ndarray]) -> None:
    """Give a picture to the loggers that take one, from the first rank only; draw it only if there is such a logger."""
    takers = [d for d in logger.destinations if type(d).log_images is not LoggerDestination.log_images]
    if takers and dist.get_global_rank() == 0:
        # A wandb table calls home even offline, and hangs.
        logger.log_images(draw(), name=name, channels_last=True, use_table=False)


def log_histogram(logger: Logger, name: str, values: np.ndarray, step: int) -> None:
    """Give the values to TensorBoard, the only logger that takes a histogram, from the first rank only."""
    if dist.get_global_rank() != 0:
        return
    for destination in logger.destinations:
        if isinstance(destination, TensorboardLogger) and destination.writer is not None:
            destination.writer.add_histogram(name, values, global_step=step)
