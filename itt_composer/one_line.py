"""How a command ends where its input is bad: with one line. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End the process with the line ``<program>: <message>`` at a ValueError or an OSError of the block."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f'{program}: ' + re.sub(r'\s*\n\s*', ' ', str(error))) from None
