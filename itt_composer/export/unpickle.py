"""Read what PyTorch pickled, without running code that the file names.

A checkpoint is a pickle, and a pickle may name any function of any installed package and call it. Here only exact names
are looked up: PyTorch's own list of those that rebuild tensors and plain values (``weights_only``) for ``torch.save``
files, and the list below for the index of a sharded checkpoint. Everything else that a file names becomes an inert
object.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout, get_unsafe_globals_in_checkpoint, safe_globals

from itt_composer.checks import is_file_name

SHARDED_INDEX = '.metadata'
# Beside tensors and plain values, what Composer writes: times, versions, and NumPy's states of random numbers.
COMPOSER_NAMES = {
    'datetime.timedelta',
    'numpy._core.multiarray._reconstruct',
    'numpy.core.multiarray._reconstruct',
    'numpy.dtype',
    'numpy.ndarray',
    'torch.torch_version.TorchVersion',
}
SYSTEM = ('os', 'posix', 'nt', 'sys')  # PyTorch refuses them even where something inert stands in their place.
_INDEX_CLASSES = (
    *(Metadata, MetadataIndex, StorageMeta, _StorageInfo, TensorStorageMetadata, BytesStorageMetadata),
    *(ChunkStorageMetadata, TensorProperties, _MEM_FORMAT_ENCODING, torch.Size),
)
_INDEX_NAMES: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__qualname__): cls for cls in _INDEX_CLASSES},
    **{('torch', str(x).removeprefix('torch.')): x for x in vars(torch).values() if isinstance(x, torch.dtype)},
    ('torch.serialization', '_get_layout'): _get_layout,
    ('pathlib', 'PosixPath'): PurePosixPath,
    ('pathlib._local', 'PosixPath'): PurePosixPath,  # Python 3.13
}


class _Inert(dict):
    """Stands for an object of any class that is not looked up."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def load_plain(file: Path | BytesIO, **options: Any) -> Any:
    """What ``torch.save`` wrote to ``file``: tensors and plain values, with inert objects in place of others.

    Raises:
        pickle.UnpicklingError: it names a function of the operating system's.
        Exception: as PyTorch does for a damaged file.
    """
    unknown = get_unsafe_globals_in_checkpoint(file)
    if isinstance(file, BytesIO):
        file.seek(0)
    if refused := [name for name in unknown if name.split('.')[0] in SYSTEM]:
        raise pickle.UnpicklingError(f'it names {refused[0]}, which no checkpoint needs')
    with safe_globals([(_Inert, name) for name in unknown]):
        return torch.load(file, map_location='cpu', weights_only=True, **options)


class IndexReader(FileSystemReader):
    """PyTorch's reader of sharded checkpoints, whose index is read by exact names."""

    def read_metadata(self) -> Metadata:
        """The index.

        Raises:
            pickle.UnpicklingError: it names what no index holds, or files outside the checkpoint's folder.
        """
        with open(Path(self.path) / SHARDED_INDEX, 'rb') as file:
            metadata = _IndexUnpickler(file).load()
        for place in metadata.storage_data.values():
            if not is_file_name(place.relative_path):
                raise pickle.UnpicklingError(f'its index names {place.relative_path!r}, outside its folder')
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _INDEX_NAMES:
            raise pickle.UnpicklingError(f'its index names {module}.{name}, which no index holds')
        return _INDEX_NAMES[module, name]


def check_names(path: Path) -> None:
    """See that a checkpoint names nothing but what Composer writes, before Composer reads it by full unpickling.

    Args:
        path: a ``.pt`` file or a sharded folder.

    Raises:
        ValueError: it names something else, is damaged, or is no checkpoint.
    """
    try:
        files = _objects(path) if path.is_dir() else [path]
        names = {name for file in files for name in get_unsafe_globals_in_checkpoint(file)}
    except Exception as error:  # A damaged or hostile file may raise any.
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(
            f'{path}: not a complete checkpoint ({type(error).__name__}: {reason}); use another checkpoint'
        ) from None
    if unknown := sorted(names - COMPOSER_NAMES):
        raise ValueError(
            f'{path}: reading it would call {unknown[0]}, which may run any code; use a checkpoint that Composer '
            'wrote, or export this one, which runs no code from it'
        )


def _objects(folder: Path) -> Iterator[BytesIO]:
    """The pickles in a sharded checkpoint: all that is no tensor."""
    metadata = IndexReader(folder).read_metadata()
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with open(folder / place.relative_path, 'rb') as file:
                file.seek(place.offset)
                yield BytesIO(file.read(place.length))
