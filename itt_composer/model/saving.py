"""What is saved of a model carries the model's code, so that other machines can load it without this package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from itt_composer.model.config import ITTConfig

MODELING = 'modeling_itt'
AUTO_MAP = {
    'AutoConfig': f'{MODELING}.ITTConfig',
    'AutoModel': f'{MODELING}.ITTModel',
    'AutoModelForCausalLM': f'{MODELING}.ITTForCausalLM',
}


class SelfContained:
    """A model whose ``save_pretrained`` writes ``modeling_itt.py`` and points to it in ``config.json``."""

    config: ITTConfig

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **options: Any) -> None:
        """Transformers' ``save_pretrained``, and the model's code beside the weights."""
        self.config.auto_map = dict(AUTO_MAP)
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            (Path(save_directory) / f'{MODELING}.py').write_text(_source(), encoding='utf-8')
        super().save_pretrained(save_directory, is_main_process=is_main_process, **options)  # type: ignore[misc]


def _source() -> str:
    """The package's modules as one file; where this code is that file, the file itself."""
    if __name__ != 'itt_composer.model.saving':
        return Path(__file__).read_text(encoding='utf-8')
    # No import statement, which transformers would take for something that the modelling file needs.
    return importlib.import_module('itt_composer.model.standalone').modeling_source()
