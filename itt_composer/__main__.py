"""``python -m itt_composer`` is ``itt``."""

from itt_composer.cli import app

app(prog_name='itt')
