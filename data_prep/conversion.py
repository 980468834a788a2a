"""A conversion from start to end: recognise that it is done, or check, plan, convert and finish.

State of an output folder: ``.conversion/job.json`` says what is being converted, ``.conversion/work_items/`` holds what
is done. ``manifest.json`` comes last: a folder that has one is complete.

streaming takes long to import, so what needs it (work_item, engines, finish) is imported once a job is known to be new.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.input.domains import shares, too_short
from data_prep.input.embedded import write_corpus
from data_prep.input.reader import BadLine
from data_prep.input.sources import LeftOut, Source, SourceFile, open_source
from data_prep.job import check_same, check_versions, describe
from data_prep.manifest import write_manifest
from data_prep.split import VALIDATION_SHARES, read_sample, take_census, thresholds
from data_prep.tokens.document_tokenizer import load_document_tokenizer
from data_prep.tokens.tokenizer import TokenizerRequest, save_tokenizer
from itt_composer.atomic import remove_leftovers, write_json
from itt_composer.checks import check_choice, read_json
from itt_composer.training.run_lock import LOCK, only_process

if TYPE_CHECKING:
    from data_prep.work_item import WorkItem, WorkItemRecord

# What a kill can lose, for each worker; some seconds of work.
WORK_ITEM_BYTES = 64 << 20
# Text that the embedded tokenizer is trained on, from each domain.
_TRAINING_BYTES = 4 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

ENGINES = ('local', 'ray')
Announce = Callable[[dict[str, Any]], None]


def convert(
    source: str | Path | None,
    out: str | Path,
    tokenizer: str | None = None,
    seq_len: int = 4096,
    validation_tokens: int = 2_000_000,
    workers: int | None = None,
    max_bad_lines: int = 100,
    work_item_bytes: int = WORK_ITEM_BYTES,
    engine: str = 'local',
    announce: Announce | None = None,
    text_field: str = 'text',
    validation_shares: str = 'recipe',
) -> dict[str, Any]:
    """Convert text into MDS shards of token sequences, and return the manifest.

    ``source``: what ``open_source`` takes; None: a small corpus of text found on this machine. ``tokenizer``: a
    tokenizer.model, a folder, a hub id, or None to train a small one. ``workers`` None: one per CPU that this
    process may use. ``work_item_bytes``: size of a work item. ``engine``: one of ``ENGINES``. ``announce`` is told what
    is known of each domain (``proportion``, ``estimated_tokens``) before the work begins. ``text_field``: the field or
    column with the text. ``validation_shares``: one of ``VALIDATION_SHARES`` (``thresholds``). A finished conversion of
    the same things returns immediately, an interrupted one is continued.

    Raises a ValueError for what cannot be converted, before the long work where it can be known.
    """
    for name, value, least in (
        ('--seq-len', seq_len, 2),
        ('--validation-tokens', validation_tokens, 0),
        ('--workers', 1 if workers is None else workers, 1),
        ('--max-bad-lines', max_bad_lines, 0),
    ):
        if value < least:
            raise ValueError(f'{name}: expected at least {least}, got {value}')
    check_choice('--engine', engine, ENGINES)
    request = TokenizerRequest.of(tokenizer)
    out = Path(out).expanduser()
    state = out / '.conversion'
    # The state goes once the manifest is there: without it, either the manifest is, or this is no conversion.
    manifest = read_json(out / 'manifest.json')
    ours = state.is_dir() or 'format_version' in (manifest or {})
    if not ours and out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        raise ValueError(f'--out: {out} was not written by itt data; pass a new or empty folder')
    check_choice('--validation-shares', validation_shares, VALIDATION_SHARES)
    settings: dict[str, int | str] = {
        'seq_len': seq_len,
        'validation_tokens': validation_tokens,
        'validation_shares': validation_shares,
        'text_field': text_field,
        'work_item_bytes': work_item_bytes,
    }
    given = None if source is None else open_source(source)

    def check(job: dict[str, Any] | None) -> dict[str, Any]:
        found = given or _embedded(out, job)
        asked = describe(settings, request, found)
        if job is not None:
            check_same(out, job, asked)
        return asked

    if not state.is_dir() and manifest:
        check(manifest)
        return manifest
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except PermissionError as error:
            raise ValueError(f'--out: cannot write {error.filename}: {error.strerror}') from error
        with only_process(out, 'pass another --out'):
            state.mkdir(exist_ok=True)
            manifest = read_json(out / 'manifest.json')
            job = manifest or read_json(state / 'job.json')
            asked = check(job)
            if manifest is None:
                manifest = _convert(asked, job, tokenizer, out, workers, max_bad_lines, engine, announce)
            shutil.rmtree(state)
            # A complete folder is never written again: whoever still gets this lock finds the manifest.
            (out / LOCK).unlink()
            return manifest
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise ValueError(
            f'--out: no space left in {out} ({error.strerror}); free some, and run the same command again to continue'
        ) from error


def _embedded(out: Path, job: dict[str, Any] | None) -> Source:
    """The embedded corpus in ``out``, which is made where nothing has begun."""
    corpus = out / 'source'
    if not corpus.is_dir():
        if job is not None:
            raise ValueError(f'--out: {out} holds a conversion of {job["source"]["folder"]}; pass another folder')
        write_corpus(corpus)
    return open_source(corpus)


def _convert(
    wanted: dict[str, Any],
    job: dict[str, Any] | None,
    tokenizer: str | None,
    out: Path,
    workers: int | None,
    max_bad_lines: int,
    engine: str,
    announce: Announce | None,
) -> dict[str, Any]:
    source = Path(wanted['source']['folder'])
    files = [SourceFile(**file) for file in wanted['source']['files']]
    for folder in (out, out / '.conversion', out / 'train', out / 'validation'):
        remove_leftovers(folder)
    for abandoned in (out / '.conversion').glob('work_items/*/*.partial'):
        # Renamed first: a worker of a cluster that outlived its driver can no longer give it a work item's name.
        target = abandoned.with_suffix('.abandoned')
        shutil.rmtree(target, ignore_errors=True)  # left by a kill within the removal below
        shutil.rmtree(abandoned.rename(target), ignore_errors=True)
    if job is None:
        job = _prepare(wanted, tokenizer, source, files, out)
        write_json(job, out / '.conversion' / 'job.json')
    else:
        check_versions(out, job, wanted)
    if announce is not None:
        announce(job['domains'])

    from data_prep.engines import run_work_items
    from data_prep.finish import finish_domain, merge_validation, trained_candidates
    from data_prep.work_item import Recipe, plan_work_items, read_record

    # Absolute: the workers of a cluster have other working directories.
    recipe = Recipe(
        source=source.absolute(),
        work_items_folder=out.absolute() / '.conversion' / 'work_items',
        tokenizer_folder=out.absolute() / 'tokenizer',
        seq_len=job['settings']['seq_len'],
        bos_token_id=job['tokenizer']['bos_token_id'],
        eos_token_id=job['tokenizer']['eos_token_id'],
        thresholds={name: domain['validation_threshold'] for name, domain in job['domains'].items()},
        max_bad_lines=max_bad_lines,
        text_field=job['settings']['text_field'],
        token_dtype=job['tokenizer']['token_dtype'],
    )
    items = plan_work_items(files, job['settings']['work_item_bytes'])
    records = {item: read_record(recipe.work_items_folder / item.name) for item in items}
    run_work_items(engine, recipe, records, workers)

    done = {item: record for item in items if (record := read_record(recipe.work_items_folder / item.name))}
    assert len(done) == len(items)
    moved = trained_candidates(recipe, items)
    manifest = {**job, 'bad_lines': []}
    manifest['source']['left_out'] += _without_lines(done)
    for name, domain_items in itertools.groupby(items, key=lambda item: item.domain):
        group = list(domain_items)
        train, validation, bad_lines = finish_domain(recipe, group, out, moved)
        manifest['domains'][name] |= {
            'bad_lines': len(bad_lines),
            'empty_documents': sum(done[item].empty_documents for item in group),
            'train': asdict(train),
            'validation': asdict(validation),
        }
        manifest['bad_lines'] += bad_lines
    merge_validation(out, recipe.work_items_folder)
    return write_manifest(out, manifest)


def _without_lines(records: Mapping[WorkItem, WorkItemRecord]) -> list[dict[str, str]]:
    """The files in which no line was, archives of nothing for example, as left out."""
    lines: dict[str, int] = {}
    for item, record in records.items():
        lines[item.path] = lines.get(item.path, 0) + record.lines
    return [asdict(LeftOut(path, 'no lines in it')) for path, count in lines.items() if not count]


def _prepare(
    wanted: dict[str, Any], tokenizer: str | None, source: Path, files: Sequence[SourceFile], out: Path
) -> dict[str, Any]:
    """Make the tokenizer, look at each domain, and settle what the work items will need."""
    files_of = {name: list(group) for name, group in itertools.groupby(files, key=lambda file: file.domain)}
    saved = _save_tokenizer(
        tokenizer, _training_texts(source, files_of, wanted['settings']['text_field']), out / 'tokenizer'
    )
    loaded = load_document_tokenizer(out / 'tokenizer')
    censuses = {
        name: take_census(source, group, wanted['settings']['text_field'], loaded) for name, group in files_of.items()
    }
    seq_len = wanted['settings']['seq_len']
    for name, census in censuses.items():
        # At worst every byte is a token, with BOS, EOS and a space added to each document.
        if census.complete and census.text_bytes + 3 * len(census.sizes) < seq_len:
            raise ValueError(too_short(name, f'{census.text_bytes:.0f} bytes of text', seq_len))
    threshold = thresholds(censuses, wanted['settings']['validation_tokens'], wanted['settings']['validation_shares'])
    share = shares({name: census.tokens for name, census in censuses.items()})
    domains = {
        name: {
            'proportion': share[name],
            'estimated_tokens': round(census.tokens),
            'validation_threshold': threshold[name],
        }
        for name, census in censuses.items()
    }
    return {**wanted, 'tokenizer': wanted['tokenizer'] | saved, 'domains': domains}


def _save_tokenizer(name: str | None, texts: Iterator[str], folder: Path) -> dict[str, Any]:
    try:
        return save_tokenizer(name, texts, folder)
    except Exception as error:
        # What the system refuses reaches us from tokenizers' Rust as a bare Exception with a number in its text.
        number = re.search(r'\(os error (\d+)\)', str(error))
        if type(error) is not Exception or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def _training_texts(source: Path, files_of: dict[str, list[SourceFile]], text_field: str) -> Iterator[str]:
    for files in files_of.values():
        left = _TRAINING_BYTES
        for document, _ in read_sample(source, files, text_field):
            if isinstance(document, BadLine):
                continue
            yield document.text[:left]
            left -= len(document.utf8)
            if left <= 0:
                break
