"""The YAML files that come with the package: training configs, config groups, studies, evaluation files.

They lie in ``yamls/`` at the top of the repository, and inside the package once it is installed from a wheel.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from itt_composer.checks import did_you_mean


def yamls_folder() -> Path:
    """The folder with the training configs, ``parts/``, ``studies/`` and ``eval/``."""
    package = Path(str(files('itt_composer')))
    installed = package / 'yamls'
    return installed if installed.is_dir() else package.parent / 'yamls'


def names(folder: str = '.') -> list[str]:
    """Names of the YAML files in a folder of :func:`yamls_folder`: ``'.'`` (training configs), ``'studies'``, ..."""
    return sorted(path.stem for path in (yamls_folder() / folder).glob('*.yaml'))


def find_file(name: str | Path, folder: str = '.') -> Path:
    """The file at a path, or the one of that name that comes with the package.

    Args:
        name: ``itt_x4_162m``, ``sft/gsm8k_itt_x2``, or a path such as ``~/runs/mine.yaml``.
        folder: where a name is looked for, as for :func:`names`.

    Raises:
        ValueError: no such file; names the nearest.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    own = yamls_folder() / folder / f'{str(name).removesuffix(".yaml")}.yaml'
    if not path.is_absolute() and '..' not in path.parts and own.is_file():
        return own
    known = [file.name for file in path.parent.glob('*.yaml')] if path.suffix == '.yaml' else names(folder)
    raise ValueError(f'{name}: no such file, and no name that `itt ls` lists{did_you_mean(path.name, sorted(known))}')


def rank_0_file(load_path: str, run_name: str) -> str:
    """A local ``load_path`` with ``{rank}`` and the like filled in as Composer does: all ranks load rank 0's file."""
    if '://' not in load_path:
        for name, value in (('rank', '0'), ('local_rank', '0'), ('node_rank', '0'), ('run_name', run_name)):
            load_path = load_path.replace(f'{{{name}}}', value)
    return load_path
