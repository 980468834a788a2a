"""The tokenizer's files of an exported folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def save_tokenizer(files: dict[str, Any], name: str | None, folder: Path) -> None:
    """The tokenizer of that name, or without one the files that the checkpoint holds.

    Raises:
        ValueError: no tokenizer of that name, or a file of the checkpoint's that would replace one of the model's.
    """
    if name is not None:
        try:
            AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f'tokenizer {name}: {" ".join(str(error).split())[:200]}') from None
        return
    for file, content in files.items():
        if (folder / file).exists():
            raise ValueError(f'tokenizer: its file {file} would replace the file of the model; pass --tokenizer')
        if isinstance(content, bytes):
            (folder / file).write_bytes(content)
        elif file.endswith('.txt'):
            (folder / file).write_text('\n'.join(content), encoding='utf-8')
        elif file.endswith('.json'):
            if isinstance(content, dict):
                content = {key: value for key, value in content.items() if key != 'auto_map'}  # Code of its own.
            (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
        else:
            (folder / file).write_text(content, encoding='utf-8')


def name_inputs(folder: Path) -> None:
    """Have the folder's tokenizer give what the models take; a bare fast one gives ``token_type_ids`` too."""
    file = folder / 'tokenizer_config.json'
    if file.is_file():
        config = json.loads(file.read_text(encoding='utf-8'))
        config.setdefault('model_input_names', ['input_ids', 'attention_mask'])
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
