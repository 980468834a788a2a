"""A study's folder: the results of each run, and the files that the report reads.

results.csv, elastic.csv    the tables; answers.csv of the k-hop study too
manifest.json               config, machine and versions of each run
runs/<run>/                 checkpoints, manifest.json, results.csv
runs/tensorboard/<run>/     its logs
logs/<run>.log              its output
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from itt_composer.atomic import write_json, write_text
from itt_composer.config.pretrained import weights_sha256
from itt_composer.config.run_file import resolve
from itt_composer.training.manifest import manifest_path, recorded
from research.study.results import MANIFEST, RESULTS, collect, final, read_table, write_table
from research.study.settings import compare_configs
from research.study.stored import StoredResults, data_of
from research.study.study_file import Run, Study

_weights_sha256 = cache(weights_sha256)


@dataclass
class StudyFolder:
    """The runs of a study in its folder; ``done`` are those with results, here or ``stored`` elsewhere.

    ``elsewhere`` has the place of the latter and their name there.
    """

    study: Study
    path: Path
    stored: tuple[StoredResults, ...] = ()
    configs: dict[str, DictConfig] = field(default_factory=dict)
    done: dict[str, pd.DataFrame] = field(default_factory=dict)
    known: dict[str, Run] = field(default_factory=dict)
    elsewhere: dict[str, tuple[StoredResults, str]] = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        """Value of ``variables.runs`` for the study's runs."""
        return self.path / 'runs'

    def add(self, runs: Iterable[Run]) -> list[Run]:
        """Resolve the runs and look for their results; returns those without, in order.

        Raises:
            ValueError: a training config is invalid, or results belong to another config or other data.
        """
        open_runs = []
        for run in runs:
            try:
                config = resolve(run.run_file, run.overrides)
                if pretrained := config.model.get('pretrained'):
                    config.variables.pretrained_weights = _weights_sha256(pretrained)  # As its manifest has it.
                self._check_same(run, config)
                self.known[run.name], self.configs[run.name] = run, config
                file = self.runs / run.name / RESULTS
                rows = read_table(file) if file.is_file() else self._stored_rows(run)
                if rows is None:
                    open_runs.append(run)
                else:
                    self.done[run.name] = rows
            except ValueError as error:
                raise ValueError(f'{run.name}: {error}') from None
        return open_runs

    def finish(self, name: str) -> str:
        """Collect a finished run and write the tables; returns a line with its loss, or that it diverged.

        Raises:
            ValueError: the run has not reached its end.
        """
        run = self.known[name]
        rows = collect(self.study.name, run, self.configs[name])
        if rows is None:
            raise ValueError(
                f'no evaluation at its last batch in {self.runs / "tensorboard" / name}; to train it again remove '
                f'that folder and {self.runs / name}'
            )
        write_table(rows, self.runs / name / RESULTS)
        self.done[name] = rows
        self.write()
        last = final(rows).iloc[0]
        if math.isnan(last.loss_threshold):
            return 'diverged: its loss was not finite'
        return f'loss {last.loss_threshold:.4f} after {last.batch} batches'

    def table(self) -> pd.DataFrame:
        """Return the rows of all runs that are done, in the study's order."""
        tables = [self.done[name] for name in self.known if name in self.done]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def write(self) -> None:
        """Write ``results.csv`` and ``manifest.json``."""
        write_table(self.table(), self.path / RESULTS)
        write_json(self._manifest(), self.path / MANIFEST)

    def carry_over(self, file: str) -> None:
        """Copy the rows of stored runs from the table of that name into the one here."""
        rows = []
        for name, (stored, there) in self.elsewhere.items():
            rows.append(stored.more_rows(file, there).assign(run=name, variant=self.known[name].variant))
        if not rows or (carried := pd.concat(rows)).empty:
            return
        here = pd.read_csv(self.path / file) if (self.path / file).is_file() else pd.DataFrame(columns=carried.columns)
        own = here[~here.run.isin(self.elsewhere)]
        write_text(pd.concat([own, carried]).to_csv(index=False, float_format='%.6g'), self.path / file)

    def checkpoints(self, name: str) -> Path:
        """Return the folder of a run's checkpoints."""
        return Path(self.configs[name].save_folder)

    def _manifest(self) -> dict[str, Any]:
        environments: list[dict[str, Any]] = []
        for name in self.done:
            environment = self._environment(name)
            known = next((entry for entry in environments if entry['environment'] == environment), None)
            if known is None:
                known = {'environment': environment, 'runs': []}
                environments.append(known)
            known['runs'].append(name)
        first = next(iter(self.configs.values()))
        return {
            'study': self.study.name,
            'data': data_of(first),
            'environments': environments,
            'runs': {
                name: {'run_file': run.run_file.name, 'overrides': list(run.overrides)}
                for name, run in self.known.items()
                if name in self.done
            },
        }

    def _stored_rows(self, run: Run) -> pd.DataFrame | None:
        config = self.configs[run.name]
        for stored in self.stored:
            if there := stored.name_of(run, config):
                self.elsewhere[run.name] = stored, there
                return stored.rows(there).assign(
                    study=self.study.name, run=run.name, stage=run.stage, variant=run.variant, setting=run.setting
                )
        for stored in self.stored:
            stored.check_name(self.study.name, run, config)
        return None

    def _environment(self, name: str) -> dict[str, Any] | None:
        if name in self.elsewhere:
            stored, there = self.elsewhere[name]
            return stored.environment(there)
        path = manifest_path(self.configs[name])
        return json.loads(path.read_text())['environment'] if path and path.is_file() else None

    def _check_same(self, run: Run, config: DictConfig) -> None:
        path = manifest_path(config)
        if path is None or not path.is_file():
            return
        before = OmegaConf.create(json.loads(path.read_text())['config'])
        difference = compare_configs(before, OmegaConf.create(recorded(config)))
        if difference:
            raise ValueError(
                f'{path.parent} is a run with another config: {difference}; set another folder (--out), '
                f'or remove that one and {self.runs / "tensorboard" / run.name}'
            )
