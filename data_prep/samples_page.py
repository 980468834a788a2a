"""A page of decoded sequences, for a person to look through what a model will be trained on."""

from __future__ import annotations

import html
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from streaming import LocalDataset
from tokenizers import Tokenizer

from data_prep.tokens.tokenizer import load_saved
from itt_composer.atomic import write_text

ROWS = 3
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; padding: 1rem;
  border: 1px solid #8886; border-radius: 4px; font: 13px/1.45 ui-monospace, monospace; }
b { color: #b3541e; }
:root { color-scheme: light dark; }
"""


def write_page(out: Path) -> Path:
    """Write ``OUT/samples.html``: some sequences of each domain and split; the same folder gives the same page."""
    manifest = json.loads((out / 'manifest.json').read_text(encoding='utf-8'))
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Samples of the data</title>',
        f'<style>{_STYLE}</style><h1>Samples of the data</h1>',
        f'<p>Sequences of {manifest["settings"]["seq_len"]} tokens, chosen at random and decoded; ',
        '<b>&lt;s&gt;</b> and <b>&lt;/s&gt;</b> stand where a document begins and ends.</p>',
    ]
    for domain, counts in manifest['domains'].items():
        for split in ('train', 'validation'):
            if counts[split]['rows']:
                parts += _section(out, manifest['tokenizer'], split, domain)
    write_text('\n'.join(parts), out / 'samples.html')
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
