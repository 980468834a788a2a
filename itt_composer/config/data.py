"""What a training config leaves to the data folder: a stream per domain, evaluation loaders per domain, the vocabulary.

``itt_composer.data_folder`` describes the folder. With ``variables.remote`` (``s3://bucket/redpajama``) the shards lie
there in the same layout and ``variables.data`` is the local cache, which then needs only ``tokenizer/`` and
``manifest.json`` of them.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from itt_composer.checks import did_you_mean
from itt_composer.data_folder import (
    check_domains,
    check_unchanged,
    domains_in,
    fingerprint,
    load_tokenizer,
    no_shards,
    read_manifest,
    read_shards,
    vocabulary_size,
)

log = logging.getLogger(__name__)


def fill_in_vocabulary(config: DictConfig) -> None:
    """Fill ``model.vocab_size``, ``bos_token_id`` and ``eos_token_id`` from the data's tokenizer where they are null.

    Raises:
        ValueError: no tokenizer where one is needed, or one whose ids do not fit ``model.vocab_size``.
    """
    model, folder = config.model, Path(config.variables.data) / 'tokenizer'
    open_keys = [key for key in ('vocab_size', 'bos_token_id', 'eos_token_id') if key in model and model[key] is None]
    if not (folder / 'tokenizer.json').is_file():
        if open_keys:
            raise ValueError(
                f'model.{open_keys[0]} follows the tokenizer of the data, and there is no {folder}/tokenizer.json; '
                f'run: itt data --source <text> --out {config.variables.data}, or set variables.data=<dir> or '
                f'model.{open_keys[0]}'
            )
        return
    tokenizer, ids = load_tokenizer(folder)
    size = vocabulary_size(tokenizer)
    if 'vocab_size' in open_keys:
        model.vocab_size = size
    elif 'vocab_size' in model and model.vocab_size < size:
        raise ValueError(
            f'model.vocab_size: expected at least {size}, the size of the tokenizer in {folder}, got {model.vocab_size}'
        )
    for key in ('bos_token_id', 'eos_token_id'):
        if key in open_keys:
            model[key] = ids[key]
    if ids['pad_token_id'] in (ids['bos_token_id'], ids['eos_token_id']) and config.tokenizer.name == str(folder):
        # The loss leaves out what equals the padding token, and with it every end of a document.
        config.tokenizer.kwargs = {**(config.tokenizer.get('kwargs') or {}), 'pad_token': None}


def fill_in_data(config: DictConfig) -> None:
    """Give the train loader a stream per domain, and make the evaluation loader a list with one per domain.

    With ``variables.merged_validation`` there is one more, ``merged``, with the sequences of all domains. What the
    manifest says of the data goes to ``variables.data_manifest``, which is logged with the rest of the config.

    ``variables.proportions`` maps domains to their fraction of the training sequences; null takes every domain,
    each sequence once per epoch, except the few that fill no batch. Loaders that the config has itself (``streams``, a
    list) stay as they are, except for the check of their ``epoch_size``.

    Raises:
        ValueError: a proportion for a missing domain, a domain without a proportion, an empty domain, sequences
            shorter than ``max_seq_len``, checkpoints between epochs.
    """
    _check_save_interval(config)
    data, remote = Path(config.variables.data), config.variables.get('remote')
    here = not remote and data.is_dir()
    proportions = config.variables.get('proportions')
    if proportions is None and not here:
        raise ValueError(
            no_shards(data, data)
            if not remote
            else 'variables.proportions: null takes every domain of the folder, which a remote cannot list; name them'
        )
    shares = _shares(proportions, data if here else None)
    train = [domain for domain, share in shares.items() if share is None or share > 0]
    manifest = read_manifest(data)
    if manifest:
        check_unchanged(data, manifest)
        if here:
            check_domains(data, manifest, manifest['domains'] if proportions is None else list(shares))
        config.variables.data_manifest = _digest(manifest)

    if 'streams' not in config.train_loader.dataset:
        streams = {}
        for domain in train:
            streams[domain] = _source(data, remote, f'train/{domain}')
            if shares[domain] is not None:
                streams[domain]['proportion'] = shares[domain]
        config.train_loader.dataset.streams = streams
        rows = None
        if here:
            rows = _checked_rows(data / 'train', train, config.max_seq_len)
        elif manifest:
            domains = manifest['domains']
            rows = sum(domains[domain]['train']['rows'] for domain in train if domain in domains)
        elif remote and config.train_loader.dataset.get('epoch_size') is None:
            raise ValueError(
                f'variables.remote: how many sequences {remote} has is in its manifest.json, and there is no {data}/'
                'manifest.json; copy it there, with tokenizer/, or set train_loader.dataset.epoch_size'
            )
        _fill_in_epoch_size(config, rows)
    else:
        _fill_in_epoch_size(config, None)

    if isinstance(config.get('eval_loader'), DictConfig):
        template = config.eval_loader
        loaders = []
        sets = _validation_sets(data, here, manifest, list(shares))
        domains = list(sets)
        if config.variables.get('merged_validation') and len(sets) > 1 and _is_merged(data, here, manifest):
            # A domain may have the name.
            sets['merged' if 'merged' not in sets else 'merged_domains'] = 'validation'
            if here:
                read_shards(data / 'validation')
        for label, split in sets.items():
            loader = template.copy()
            loader.label = label
            loader.dataset.update(_source(data, remote, split))
            loaders.append(loader)
        config.eval_loader = loaders or None
        if 'domain_mean' in (config.get('callbacks') or {}):
            config.callbacks.domain_mean.setdefault('domains', domains)


def _fill_in_epoch_size(config: DictConfig, rows: int | None) -> None:
    """Make an epoch complete batches and rounds of the canonical nodes, near ``rows`` sequences (None: unknown).

    streaming fills an epoch up to complete rounds. Composer leaves the filling out of an epoch that it began, and runs
    through it in one that it resumed: every later batch would be another than without the stop.
    """
    dataset, batch = config.train_loader.dataset, config.global_train_batch_size
    nodes = dataset.get('num_canonical_nodes') or 1
    size = dataset.get('epoch_size')
    whole = math.lcm(nodes, batch)
    asked = rows if size is None else _count(size)
    if asked is None:
        return
    fits = max(1, asked // whole) * whole
    if size is None:
        dataset.epoch_size = fits
    elif asked % whole:
        raise ValueError(
            f'train_loader.dataset.epoch_size: {size} is no multiple of {whole} (of global_train_batch_size and '
            f'num_canonical_nodes), so a resumed run would have other batches; set {fits}'
        )


def _check_save_interval(config: DictConfig) -> None:
    """Between two epochs Composer stores the place of the one before; dynamic batch loading alone sets it right."""
    interval, dynamic = str(config.get('save_interval')), (config.get('callbacks') or {}).get('dynamic_batch_loading')
    if not dynamic and (interval.endswith('ep') or interval.isdigit()):  # Composer takes a bare number for epochs.
        raise ValueError(
            f'save_interval: expected batches, such as 1000ba, got {interval}: from a checkpoint at the end of an '
            'epoch, a resumed run would read that epoch again'
        )


def _count(size: int | str) -> int:
    """A number as streaming takes it, 256000 or '256k'."""
    if isinstance(size, int):
        return size
    from streaming.base.util import number_abbrev_to_int  # its import takes seconds, which few training configs need

    return number_abbrev_to_int(size)


def _digest(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without its lists of files, but with a hash of what was made."""
    source = manifest['source']
    return {key: manifest[key] for key in ('settings', 'tokenizer', 'versions', 'domains')} | {
        # Version 0.1 wrote no such key, and listed the indices of all parts among the files.
        'content_sha256': manifest.get('content_sha256') or fingerprint(manifest['files']),
        'source': {'folder': source['folder'], 'files': len(source['files'])},
        'bad_lines': len(manifest['bad_lines']),
    }


def _validation_sets(data: Path, here: bool, manifest: dict[str, Any] | None, trained: list[str]) -> dict[str, str]:
    """Each domain's evaluation set below ``data``. A domain without sequences has none: its metrics would be NaN."""
    if here:
        domains = domains_in(data / 'validation')
        for domain in domains:
            read_shards(data / 'validation' / domain)
    elif manifest:
        domains = [name for name, domain in manifest['domains'].items() if domain['validation']['rows']]
    else:
        domains = trained
    return {domain: f'validation/{domain}' for domain in domains}


def _is_merged(data: Path, here: bool, manifest: dict[str, Any] | None) -> bool:
    if here:
        return (data / 'validation' / 'index.json').is_file()
    return manifest is not None and 'validation/index.json' in manifest['files']


def _source(data: Path, remote: str | None, split: str) -> dict[str, Any]:
    source: dict[str, Any] = {'local': str(data / split)}
    if remote:
        source['remote'] = f'{remote.rstrip("/")}/{split}'
    return source


def _shares(proportions: DictConfig | None, data: Path | None) -> dict[str, float | None]:
    """Domain to its fraction of the training sequences, or None: by size. ``data``: None where it cannot be listed."""
    there = domains_in(data / 'train') if data else None
    if data and there == []:
        raise ValueError(no_shards(data / 'train', data))
    if proportions is None:
        assert there is not None
        return dict.fromkeys(there)
    shares: dict[str, float | None] = {}
    for key, share in proportions.items():
        domain = str(key)
        if there is not None and domain not in there:
            # A share of zero says that the domain is not wanted, there or not.
            if share == 0:
                continue
            raise ValueError(
                f'variables.proportions: no domain {domain!r} in {data}/train (there are {", ".join(there)})'
                f'{did_you_mean(domain, there)}; to go without it: variables.proportions.{domain}=0'
            )
        if not isinstance(share, (int, float)) or not (0 <= share < math.inf):
            raise ValueError(
                f'variables.proportions: {share!r} for {domain} is not a fraction of the training sequences'
            )
        shares[domain] = float(share)
    unnamed = [domain for domain in there or [] if domain not in shares]
    if unnamed:
        raise ValueError(
            f'variables.proportions: none for {unnamed[0]!r}, which is in {data}/train; '
            f'to go without it: variables.proportions.{unnamed[0]}=0; to take every domain: variables.proportions=null'
        )
    if not any(shares.values()):
        raise ValueError('variables.proportions: expected a number above 0 for at least one domain; set one, or null')
    return shares


def _checked_rows(folder: Path, domains: list[str], max_seq_len: int) -> int:
    """How many sequences the domains have together.

    Each must have some, of at least ``max_seq_len`` tokens (longer ones are cut by foundry's loader).
    """
    rows = longest = 0
    for domain in domains:
        shards = read_shards(folder / domain)
        samples = sum(shard['samples'] for shard in shards)
        rows += samples
        if not samples:
            raise ValueError(f'{folder / domain} has no sequences; to go without it: variables.proportions.{domain}=0')
        encoding = dict(zip(shards[0]['column_names'], shards[0]['column_encodings'], strict=True)).get('tokens', '')
        # 'ndarray:uint16:4096' holds the sequence's length; the forms without a shape do not.
        length = encoding.split(':')[2] if encoding.count(':') == 2 else ''
        if length.isdigit() and int(length) < max_seq_len:
            raise ValueError(
                f'max_seq_len: {max_seq_len}, but the sequences of {folder / domain} have {length} tokens; '
                f'set max_seq_len={length}, or make the data again with --seq-len {max_seq_len}'
            )
        if length.isdigit():
            longest = max(longest, int(length))
    if longest > max_seq_len:
        log.warning(
            'max_seq_len: %d, and the sequences of %s have %d tokens; the rest of each is not trained on',
            *(max_seq_len, folder, longest),
        )
    return rows
