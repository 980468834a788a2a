"""A page of the steps that each token of a text is routed to (Figure 7, left).

itt tokens MODEL --text 'Any text, or a file' --out tokens.html
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from itt_composer.analysis.routing_records import token_thinking
from itt_composer.analysis.token_page import Passage, token_page, token_pieces
from itt_composer.atomic import write_text
from itt_composer.export.load import as_routed, load
from itt_composer.model import ITTForCausalLM
from itt_composer.one_line import one_line_errors
from itt_composer.ratios import ratios_key


def read_text(text: str) -> tuple[str, str]:
    """Return a title and the text: of a file, of standard input for ``-``, or ``text`` itself.

    Raises:
        ValueError: a file that is missing or not UTF-8, or nothing to read.
    """
    if text == '-':
        title, content = 'standard input', sys.stdin.read()
    elif os.path.isfile(text):  # Path.is_file raises where a text is too long for a name.
        try:
            title, content = Path(text).name, Path(text).read_text(encoding='utf-8')
        except UnicodeDecodeError:
            raise ValueError(f'{text}: not a text in UTF-8') from None
    elif len(text.split()) == 1 and (Path(text).suffix or '/' in text):
        raise ValueError(f'{text}: no such file')
    else:
        title, content = ' '.join(text.split())[:60], text
    if re.search('[\ud800-\udfff]', content):  # Bytes of the command line that are no UTF-8.
        raise ValueError(f'{text!r}: not a text in UTF-8')
    if not content.strip():
        raise ValueError(f'{text!r}: no text in it' if text != '-' else 'standard input: no text in it')
    return title, content


def passage_of_ids(model: ITTForCausalLM, tokenizer: PreTrainedTokenizerFast, title: str, ids: list[int]) -> Passage:
    """Return the tokens and how they are routed, with the active selection and ratios."""
    window = model.config.max_position_embeddings
    parts = [ids[first : first + window] for first in range(0, len(ids), window)]
    windows = [token_thinking(model, torch.tensor([part])) for part in parts]
    return Passage.of(title, token_pieces(tokenizer, ids), windows)


def describe(model: ITTForCausalLM, path: Path) -> str:
    """Describe the model and its extra steps in words."""
    assert model.routing is not None
    config, ratios = model.config, model.routing.ratios_T(training=False)
    numbers = ', '.join(map(str, config.thinking_layers))
    return (
        f'{"/".join(path.parts[-2:])}: ITT x{config.thinking_steps + 1} of {model.num_parameters() / 1e6:.4g}M '
        f'parameters, combine: {config.combine}, step encodings started at {config.step_encoding_init:g}; thinking '
        f'layers {numbers} of 0 to {config.num_hidden_layers - 1}, token ratios {ratios_key(ratios)}.'
    )


def main(
    model_path: Path,
    text: str,
    selection: str = 'threshold',
    ratios: str | None = None,
    limit: int = 4096,
    out: Path = Path('tokens.html'),
) -> None:
    """Write a page with the tokens of a text shaded by depth, layer by layer, and their gate values."""
    with one_line_errors('tokens'):
        title, content = read_text(text)
        loaded, tokenizer = load(model_path)
        model = as_routed(loaded, model_path)
        model.set_thinking(ratios, selection)
        if model.routing is None or not model.routing.steps(training=False):
            raise ValueError('ratios: every step is removed, so there is none to show; set one above 0')
    ids = tokenizer(content, verbose=False)['input_ids']
    console = Console()
    if len(ids) > limit:
        console.print(f'{len(ids)} tokens; the first {limit} are shown (--limit)', highlight=False)
    passage = passage_of_ids(model, tokenizer, title, ids[:limit])
    write_text(token_page([passage], selection, describe(model, model_path)), out)
    depth_S = passage.depth_S
    console.print(
        f'{out}: {len(depth_S)} tokens, {depth_S.mean():.2f} of {len(passage.routed_MS)} extra steps each',
        highlight=False,
    )
