"""A page of decoded sequences, for a person to look through what a model will be trained on."""

from __future__ import annotations

import html
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from markupsafe import Markup
from streaming import LocalDataset
from tokenizers import Tokenizer

from data_prep.tokens.tokenizer import load_saved
from itt_composer.analysis.html_page import page
from itt_composer.atomic import write_text

ROWS = 3


def write_page(out: Path) -> Path:
    """Write ``OUT/samples.html``: some sequences of each domain and split; the same folder gives the same page."""
    manifest = json.loads((out / 'manifest.json').read_text(encoding='utf-8'))
    parts = [
        '<h1>Samples of the data</h1>',
        f'<p>Sequences of {manifest["settings"]["seq_len"]} tokens, drawn at random and decoded; ',
        '<b>&lt;s&gt;</b> and <b>&lt;/s&gt;</b> stand where a document begins and ends.</p>',
    ]
    for domain, counts in manifest['domains'].items():
        for split in ('train', 'validation'):
            if counts[split]['rows']:
                parts += _section(out, manifest['tokenizer'], split, domain)
    write_text(page('Samples of the data', [Markup(part) for part in parts]), out / 'samples.html')
    return out / 'samples.html'


def _section(out: Path, tokenizer: dict[str, int], split: str, domain: str) -> Iterator[str]:
    rows = LocalDataset(str(out / split / domain))
    rust = load_saved(out / 'tokenizer')
    yield f'<h2>{html.escape(domain)}, {split}: {len(rows):,} sequences</h2>'
    for i in sorted(random.Random(0).sample(range(len(rows)), min(ROWS, len(rows)))):
        yield f'<h3>sequence {i:,}</h3><pre>{_decoded(rows[i]["tokens"].tolist(), tokenizer, rust)}</pre>'


def _decoded(ids: list[int], tokenizer: dict[str, int], rust: Tokenizer) -> str:
    """HTML of a sequence, its special tokens marked."""
    marks = {tokenizer['bos_token_id']: '<b>&lt;s&gt;</b>', tokenizer['eos_token_id']: '<b>&lt;/s&gt;</b>'}
    pieces = []
    for special, run in itertools.groupby(ids, key=marks.get):
        tokens = list(run)
        pieces.append(special * len(tokens) if special else html.escape(rust.decode(tokens)))
    return ''.join(pieces)
