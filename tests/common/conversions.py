"""A small conversion: its tokenizer, its source, and what it wrote."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import zstandard

from data_prep.conversion import convert
from data_prep.tokens.tokenizer import save_tokenizer

SEQ_LEN = 64
BOS, EOS = 1, 2
WORDS = [first + last for first in ('st', 'qu', 'm', 'l', 'b', 'e') for last in ('at', 'one', 'ing', 'or', 'y')]


def write_tokenizer(folder: Path) -> str:
    save_tokenizer(None, [' '.join(WORDS)] * 3, folder)
    return str(folder)


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pack = {'.gz': gzip.compress, '.zst': zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(pack(''.join(line + '\n' for line in lines).encode()))


def write_source(folder: Path) -> Path:
    """Five domains, each kind of file, documents from empty to many rows long, and texts that occur twice."""
    generator = random.Random(0)

    def lines(count, longest):
        texts = [' '.join(generator.choices(WORDS, k=generator.randrange(longest))) for _ in range(count)]
        return [json.dumps({'meta': {}, 'text': text}) for text in texts]

    copies = lines(40, 60)
    write_lines(folder / 'common_crawl/2019-30/a.jsonl.zst', lines(60, 80))
    write_lines(folder / 'common_crawl/2019-30/b.jsonl.zst', [*lines(60, 80), *copies])
    write_lines(folder / 'c4/a.jsonl', [*copies, *lines(200, 80)])
    write_lines(folder / 'c4/b.jsonl.gz', lines(90, 80))
    write_lines(folder / 'arxiv/a.jsonl', lines(12, 1500))
    write_lines(folder / 'book/a.jsonl', lines(2, 4000))
    write_lines(folder / 'notes/a.jsonl', [*lines(80, 60), *copies[:20], 'broken', *copies[:20]])
    return folder


def run(source: Path | None, out: Path, tokenizer: str | None, **options) -> dict:
    """Convert; the manifest."""
    settings = dict(seq_len=SEQ_LEN, validation_tokens=1500, workers=2, work_item_bytes=9000)
    return convert(source, out, tokenizer, **settings | options)


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob('*') if path.is_file()}
