"""What all pictures share: colours told apart in print and by everyone, figures as arrays. No pyplot, no composer."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
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


def tidy(axis: Axes, grid: Literal['x', 'y', 'both'] = 'y') -> None:
    """Small tick labels, a faint grid, no frame at the top and the right."""
    axis.tick_params(labelsize=8)
    axis.grid(axis=grid, linewidth=0.4, alpha=0.6)
    axis.spines[['top', 'right']].set_visible(False)


def to_array(figure: Figure) -> np.ndarray:
    """The figure as pixels, uint8 [H, W, 3], drawn without pyplot and its global state."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
