"""A conversion from start to end: recognise that it is done, or check, plan, convert and finish.

State of an output folder: ``.conversion/job.json`` says what is being converted, ``.conversion/units/`` holds what is
done. ``manifest.json`` comes last: a folder that has one is whole.

streaming takes long to import, so what needs it (unit, engine, finish) is imported once a job is known to be new.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data_prep.domains import SourceFile, find_files, shares, too_short
from data_prep.embedded import write_corpus
from data_prep.job import check_same, describe, read_json, write_json
from data_prep.split import read_sample, take_census, thresholds
from data_prep.tokenizer import TokenizerRequest, load_saved, save_tokenizer

# What a kill can lose, for each worker; some seconds of work.
UNIT_BYTES = 64 << 20
# Text that the embedded tokenizer is trained on, from each domain.
_TRAINING_BYTES = 4 << 20


def convert(
    source: str | Path | None,
    out: str | Path,
    tokenizer: str | None = None,
    seq_len: int = 4096,
    validation_tokens: int = 2_000_000,
    workers: int | None = None,
    max_bad_lines: int = 100,
    unit_bytes: int = UNIT_BYTES,
) -> dict[str, Any]:
    """Convert a tree of text into MDS shards of token rows, and return the manifest.

    ``source`` None: a small corpus of text found on this machine. ``tokenizer``: a tokenizer.model, a folder, a hub id,
    or None to train a small one. ``workers`` None: one for each core. ``unit_bytes``: size of a unit of work. A
    finished conversion of the same things returns at once, an interrupted one is continued.

    Raises a ValueError for what cannot be converted, before the long work where it can be known.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    for name, value, least in (
        ('SEQ_LEN', seq_len, 2),
        ('VALIDATION_TOKENS', validation_tokens, 0),
        ('WORKERS', workers, 1),
        ('MAX_BAD_LINES', max_bad_lines, 0),
    ):
        if value < least:
            raise ValueError(f'{name}: {value} is less than {least}')
    request = TokenizerRequest.of(tokenizer)
    out = Path(out)
    state = out / '.conversion'
    manifest = read_json(out / 'manifest.json')
    job = manifest or read_json(state / 'job.json')
    if out.exists() and not state.is_dir() and manifest is None and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f'OUT: {out} holds something else; give a new or empty folder')
    if source is None:
        source = out / 'source'
        if job is None:
            state.mkdir(parents=True, exist_ok=True)
            if not source.is_dir():
                write_corpus(source)
        elif not source.is_dir():
            raise ValueError(f'OUT: {out} holds a conversion of {job["source"]["folder"]}; give another folder')
    source = Path(source)
    files = find_files(source)
    settings = {'seq_len': seq_len, 'validation_tokens': validation_tokens, 'unit_bytes': unit_bytes}
    wanted = describe(settings, request, source, files)
    if job is not None:
        check_same(out, job, wanted)
    if manifest is not None:
        shutil.rmtree(state, ignore_errors=True)
        return manifest
    state.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(state / 'lock', timeout=5):
            return _convert(wanted, read_json(state / 'job.json'), tokenizer, out, workers, max_bad_lines)
    except Timeout as error:
        raise ValueError(f'OUT: another process is converting into {out}; wait for it, or end it') from error


def _convert(
    wanted: dict[str, Any],
    job: dict[str, Any] | None,
    tokenizer: str | None,
    out: Path,
    workers: int,
    max_bad_lines: int,
) -> dict[str, Any]:
    source = Path(wanted['source']['folder'])
    files = [SourceFile(**file) for file in wanted['source']['files']]
    for abandoned in (out / '.conversion').glob('units/*/*.partial'):
        shutil.rmtree(abandoned, ignore_errors=True)
    if job is None:
        job = _prepare(wanted, tokenizer, source, files, out)
        write_json(out / '.conversion' / 'job.json', job)

    from data_prep.engine import run_local
    from data_prep.finish import finish_domain, trained_candidates
    from data_prep.unit import Recipe, plan_units, read_record

    recipe = Recipe(
        source=source,
        units_folder=out / '.conversion' / 'units',
        tokenizer_folder=out / 'tokenizer',
        seq_len=job['settings']['seq_len'],
        bos_token_id=job['tokenizer']['bos_token_id'],
        eos_token_id=job['tokenizer']['eos_token_id'],
        thresholds={name: domain['validation_threshold'] for name, domain in job['domains'].items()},
        max_bad_lines=max_bad_lines,
    )
    units = plan_units(files, job['settings']['unit_bytes'])
    records = {unit: read_record(recipe.units_folder / unit.name) for unit in units}
    run_local(recipe, records, workers)

    moved = trained_candidates(recipe, units)
    manifest = {**job, 'bad_lines': []}
    for name, group in itertools.groupby(units, key=lambda unit: unit.domain):
        train, validation, bad_lines = finish_domain(recipe, list(group), out, moved)
        manifest['domains'][name] |= {
            'bad_lines': len(bad_lines),
            'train': asdict(train),
            'validation': asdict(validation),
        }
        manifest['bad_lines'] += bad_lines
    write_json(out / 'manifest.json', manifest)
    shutil.rmtree(out / '.conversion')
    return manifest


def _prepare(
    wanted: dict[str, Any], tokenizer: str | None, source: Path, files: Sequence[SourceFile], out: Path
) -> dict[str, Any]:
    """Make the tokenizer, look at each domain, and settle what the units will need."""
    files_of = {name: list(group) for name, group in itertools.groupby(files, key=lambda file: file.domain)}
    saved = save_tokenizer(tokenizer, _training_texts(source, files_of), out / 'tokenizer')
    rust = load_saved(out / 'tokenizer')
    censuses = {name: take_census(source, group, rust) for name, group in files_of.items()}
    seq_len = wanted['settings']['seq_len']
    for name, census in censuses.items():
        # At worst every byte is a token, with BOS, EOS and a space added to each document.
        if census.complete and census.text_bytes + 3 * len(census.sizes) < seq_len:
            raise ValueError(too_short(name, f'{census.text_bytes:.0f} bytes of text', seq_len))
    threshold = thresholds(censuses, wanted['settings']['validation_tokens'])
    share = shares({name: census.tokens for name, census in censuses.items()})
    domains = {name: {'proportion': share[name], 'validation_threshold': threshold[name]} for name in files_of}
    return {**wanted, 'tokenizer': wanted['tokenizer'] | saved, 'domains': domains}


def _training_texts(source: Path, files_of: dict[str, list[SourceFile]]) -> Iterator[str]:
    for files in files_of.values():
        left = _TRAINING_BYTES
        for document, _ in read_sample(source, files):
            yield document.text
            left -= len(document.utf8)
            if left <= 0:
                break
