"""The Arrow files behind a Hugging Face data set: of a hub, in its cache, or of a local folder."""

from __future__ import annotations

from pathlib import Path

import datasets


def arrow_files(name: str) -> dict[str, list[Path]]:
    """Domain to files of the split ``train`` of a data set, which is fetched if it must be.

    ``name``: a folder that ``save_to_disk`` wrote or that ``load_dataset`` reads, or a hub id; ``id:a,b`` takes the
    configurations a and b, each a domain. Raises a ValueError if there is no such data set, split or configuration.
    """
    path, _, configurations = name.partition(':')
    folder = Path(path).expanduser()
    try:
        if any((folder / file).is_file() for file in ('state.json', 'dataset_dict.json')):
            return {folder.resolve().name: _files(datasets.load_from_disk(str(folder)))}
        if not configurations:
            there = datasets.get_dataset_config_names(path)
            if len(there) > 1:
                raise ValueError(f'it has the configurations {", ".join(there)}; name those you want: hf:{path}:a,b')
            return {Path(path).name: _files(datasets.load_dataset(path))}
        return {part: _files(datasets.load_dataset(path, part)) for part in configurations.split(',')}
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f'--source: data set {name}: {" ".join(str(error).split())}') from error


def _files(found: datasets.Dataset | datasets.DatasetDict) -> list[Path]:
    if isinstance(found, datasets.DatasetDict):
        if 'train' not in found:
            raise ValueError(f'no split train; there are {", ".join(found)}')
        found = found['train']
    return [Path(file['filename']).resolve() for file in found.cache_files]
