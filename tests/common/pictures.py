"""Pictures of tests that look at what is drawn and not at how it looks."""

from __future__ import annotations

import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure


def save_coarsely(patch: pytest.MonkeyPatch) -> None:
    """Have figures saved with few pixels, no layout and no fonts, which take most of their time."""
    save = Figure.savefig

    def savefig(figure, path, **_):
        figure.set_layout_engine('none')
        save(figure, path, dpi=20)

    patch.setattr(Figure, 'savefig', savefig)
    patch.setitem(rcParams, 'pdf.use14corefonts', True)
