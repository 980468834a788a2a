"""The common style of all figures: colours for print and for colour-blind readers. No pyplot, no composer."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, darkest first, for colour-blind readers; in grey print marker and dash differ.
COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
DASHES = ('-', '--', '-.', ':')


def line_style(i: int) -> dict[str, Any]:
    """Return colour, marker and dash of a figure's i-th line; the first 28 lines differ."""
    return {
        'color': COLOURS[i % len(COLOURS)],
        'marker': MARKERS[i % len(MARKERS)],
        'linestyle': DASHES[i // len(COLOURS) % len(DASHES)],
    }


def tidy(axis: Axes, grid: Literal['x', 'y', 'both'] = 'y') -> None:
    """Set small tick labels and a faint grid, and remove the frame at the top and the right."""
    axis.tick_params(labelsize=8)
    axis.grid(axis=grid, linewidth=0.4, alpha=0.6)
    axis.spines[['top', 'right']].set_visible(False)


def to_array(figure: Figure) -> np.ndarray:
    """Return the figure as pixels, uint8 [H, W, 3], drawn without pyplot and its global state."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
