"""A copy of a finished conversion to an object store or a folder, through streaming's own uploaders."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from streaming.base.storage import CloudUploader

_THREADS = 8

# It warns of each folder that is there, which all of them are.
logging.getLogger('streaming.base.storage.upload').setLevel(logging.ERROR)


def check_remote(remote: str) -> None:
    """Raise a ValueError if streaming knows no such kind of remote, or the store does not let us in."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _uploader(Path(folder), remote)
        except Exception as error:  # each store's client has exceptions of its own
            raise ValueError(f'--remote: {remote}: {" ".join(str(error).split())}') from error


def upload(out: Path, remote: str, manifest: Mapping[str, Any]) -> None:
    """Copy the files that a manifest lists, the manifest last; continues where an earlier call was ended.

    A complete copy is made again: what has happened to it since, nobody here knows.

    Raises a RuntimeError with what the store said where it fails.
    """
    remote = remote.rstrip('/') if '://' in remote else str(Path(remote).resolve())
    # One line for each file that is there. A conversion or a remote of another name starts its own.
    name = hashlib.sha256(f'{manifest["sha256"]} {remote}'.encode()).hexdigest()[:16]
    log = out / f'.uploaded-{name}'
    done = set(log.read_text(encoding='utf-8').splitlines()) if log.is_file() else set()
    files = [Path(path) for path in _files(out, manifest) if path not in done]
    uploader_of: dict[Path, CloudUploader] = {}

    def copy(path: Path) -> None:
        uploader_of[path.parent].upload_file(path.name)

    try:
        for folder in {path.parent for path in files}:
            uploader_of[folder] = _uploader(out / folder, f'{remote}/{folder.as_posix()}')
        with open(log, 'a', encoding='utf-8') as lines, ThreadPoolExecutor(_THREADS) as pool:
            for path, _ in zip(files, pool.map(copy, files), strict=True):
                lines.write(f'{path.as_posix()}\n')
                lines.flush()
        _uploader(out, remote).upload_file('manifest.json')
        log.unlink()
    except Exception as error:  # each store's client has exceptions of its own
        raise RuntimeError(
            f'--remote: {remote}: {" ".join(str(error).split())}; the same command continues with what is missing'
        ) from error


def _uploader(folder: Path, remote: str) -> CloudUploader:
    return CloudUploader.get((str(folder), remote), keep_local=True, exist_ok=True)


def _files(out: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Shards and the files that the manifest has hashes of, the latter after the former."""
    shards: set[str] = set()
    for index in manifest['files']:
        if index.endswith('/index.json'):
            folder = Path(index).parent
            content = json.loads((out / index).read_text(encoding='utf-8'))
            shards |= {(folder / shard['raw_data']['basename']).as_posix() for shard in content['shards']}
    return [*sorted(shards), *manifest['files']]
