"""Results of runs that were trained elsewhere, so that a long study can go on on another machine.

A study's ``results.csv`` and ``manifest.json`` are small and can be kept with the source; its checkpoints cannot.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from itt_composer.study.results import ELASTIC, MANIFEST, RESULTS, read_table
from itt_composer.study.study_file import Run

# They say where things lie, not what is trained.
PLACES = ('variables.runs=', 'variables.data=')


@dataclass(frozen=True)
class StoredResults:
    """The tables of a study's folder, or of ``docs/results/<study>``."""

    path: Path
    table: pd.DataFrame
    elastic: pd.DataFrame
    manifest: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> StoredResults:
        """Read ``results.csv``, ``manifest.json`` and, where there is one, ``elastic.csv`` of a folder.

        Raises:
            ValueError: one of the first two is not there, or is something else.
        """
        table, manifest = read_table(path / RESULTS), path / MANIFEST
        if not manifest.is_file():
            raise ValueError(f'{manifest}: not there, so it is not known how the runs of {RESULTS} were trained')
        try:
            content = json.loads(manifest.read_text(encoding='utf-8'))
        except json.JSONDecodeError as error:
            raise ValueError(f'{manifest}: not a JSON file ({error})') from None
        missing = [key for key in ('data', 'environments', 'runs') if key not in content]
        if missing:
            raise ValueError(f'{manifest}: no {missing[0]}; this is not the manifest of a study')
        elastic = path / ELASTIC
        return cls(path, table, pd.read_csv(elastic) if elastic.is_file() else pd.DataFrame(), content)

    def rows(self, run: Run, config: DictConfig) -> pd.DataFrame | None:
        """The rows of the run of this name; None where there are none.

        Raises:
            ValueError: they are of a run of this name with another run file, other overrides, or other data.
        """
        known = self.manifest['runs'].get(run.name)
        rows = self.table[self.table.run == run.name]
        if known is None or rows.empty:
            return None
        for what, before, now in (
            ('another run file', known['run_file'], run.run_file.name),
            ('other overrides', _settings(known['overrides']), _settings(run.overrides)),
            ('other data', _identity(self.manifest['data']), _identity(data_of(config))),
        ):
            if before != now:
                raise ValueError(f'{self.path}: its run of this name has {_difference(what, before, now)}')
        return rows

    def elastic_rows(self, name: str) -> pd.DataFrame:
        """The run's rows of ``elastic.csv``; empty where there are none."""
        return self.elastic[self.elastic.run == name] if len(self.elastic) else self.elastic

    def environment(self, name: str) -> dict[str, Any] | None:
        """On what the run ran, with which versions."""
        entries = (entry['environment'] for entry in self.manifest['environments'] if name in entry['runs'])
        return next(entries, None)


def data_of(config: DictConfig) -> dict[str, Any] | None:
    """What a run's data were, without the paths of the machine that made them; None where they say nothing."""
    manifest = config.variables.get('data_manifest')
    if not manifest:
        return None
    return {
        'content_sha256': manifest.content_sha256,
        'settings': OmegaConf.to_container(manifest.settings),
        'tokenizer': {'sha256': manifest.tokenizer.sha256, 'vocab_size': manifest.tokenizer.vocab_size},
        'rows': {
            str(name): {split: domain[split].rows for split in ('train', 'validation')}
            for name, domain in manifest.domains.items()
        },
    }


def _settings(overrides: Any) -> set[str]:
    return {override for override in overrides if not override.startswith(PLACES)}


def _identity(data: dict[str, Any] | None) -> Any:
    return data and data.get('content_sha256')


def _difference(what: str, before: Any, now: Any) -> str:
    if isinstance(before, set):
        before, now = (', '.join(sorted(own - other)) or 'none' for own, other in ((before, now), (now, before)))
    return f'{what}: {before} there, {now} here'
