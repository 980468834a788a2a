"""What is saved of a model carries the model's code, so that other machines can load it without this package."""

from __future__ import annotations

import importlib
from pathlib import Path

MODELING = 'modeling_itt'
AUTO_MAP = {
    'AutoConfig': f'{MODELING}.ITTConfig',
    'AutoModel': f'{MODELING}.ITTModel',
    'AutoModelForCausalLM': f'{MODELING}.ITTForCausalLM',
}


def own_source() -> str:
    """The package's modules as one file; where this code is that file, the file itself."""
    if __name__ != 'itt_composer.model.saving':
        return Path(__file__).read_text(encoding='utf-8')
    # No import statement, which transformers would take for something that the modelling file needs.
    return importlib.import_module('itt_composer.model.standalone').modeling_source()
