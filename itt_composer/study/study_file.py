"""Study files: which runs, where they run, and what is compared in the end.

    parts: {scale: cpu, study: headline}    # studies/parts/<kind>/<name>.yaml, merged in this order
    seeds: [17, 18, 19]
    arms:
      llama: {}                             # yamls/llama_<size>.yaml
      delta: {run: itt_x4, set: {model: {combine: delta}}}

A run is a run file and ``key=value`` overrides, nothing else: what ``train.py`` would be given by hand. The overrides
are those of the scale, the study, the arm and the tuned setting, in that order, then the seed. No torch is imported.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from itt_composer.run_file import load_run_file, parse_overrides, part_files
from itt_composer.thinking_options import check_choice, check_keys, check_mapping, did_you_mean

YAMLS = Path(__file__).resolve().parents[2] / 'yamls'
KEYS = ('title', 'size', 'where', 'seeds', 'set', 'arms', 'tuning', 'elastic', 'report')
REPORT_KEYS = ('baselines', 'data_efficiency', 'paper', 'steps')
PLACES = ('cpu', 'gpu', 'commands')


@dataclass(frozen=True)
class Where:
    """``cpu``: so many runs at once, one core each. ``gpu``: a GPU each. ``commands``: printed behind ``launcher``."""

    place: str = 'cpu'
    at_once: int | None = None
    """None: as many as there are cores or GPUs."""
    launcher: str = 'composer train.py'


@dataclass(frozen=True)
class Run:
    """One training. ``setting`` names the values of a tuning sweep, and is empty for the runs that are compared."""

    name: str
    arm: str
    setting: str
    seed: int
    run_file: Path
    overrides: tuple[str, ...]

    @property
    def stage(self) -> str:
        """``tuning`` or ``main``."""
        return 'tuning' if self.setting else 'main'


@dataclass(frozen=True)
class Tuning:
    """A sweep before the main runs: every arm with every setting; each arm goes on with its own best one."""

    seeds: list[int]
    set: dict[str, Any]
    settings: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """A study file, read and checked."""

    name: str
    title: str
    where: Where
    seeds: list[int]
    run_files: dict[str, Path]
    """Arm to its run file."""
    sets: dict[str, dict[str, Any]]
    """Arm to what it lays over its run file: the scale's, the study's and its own keys."""
    tuning: Tuning | None = None
    elastic: dict[str, int] = field(default_factory=dict)
    """Arms that are evaluated with more and less thinking after their training (Table 2), on so many rows."""
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """Their names, in the file's order."""
        return list(self.run_files)

    def tuning_runs(self, runs: Path) -> list[Run]:
        """The sweep's runs; ``runs`` is the folder that holds every run of the study."""
        if self.tuning is None:
            return []
        return [
            self._run(runs, arm, setting, seed, self.tuning.set, values)
            for arm in self.arms
            for setting, values in self.tuning.settings.items()
            for seed in self.tuning.seeds
        ]

    def main_runs(self, runs: Path, best: Mapping[str, str]) -> list[Run]:
        """The runs that are compared; with a sweep, those of the arms in ``best``, which maps them to a setting."""
        settings = self.tuning.settings if self.tuning else {}
        return [
            self._run(runs, arm, '', seed, settings[best[arm]] if settings else {})
            for seed in self.seeds
            for arm in self.arms
            if arm in best or not settings
        ]

    def _run(self, runs: Path, arm: str, setting: str, seed: int, *layers: dict[str, Any]) -> Run:
        name = '-'.join(filter(None, ['tuning' if setting else '', arm, setting, f's{seed}']))
        name = re.sub(r'[^\w.=-]+', '_', name)
        settings = merge(self.sets[arm], *layers)
        overrides = (*dotlist(settings), f'seed={seed}', f'run_name={name}', f'variables.runs={runs}')
        return Run(name, arm, setting, seed, self.run_files[arm], overrides)


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file, with ``key=value`` overrides of its own keys and parts.

    Raises:
        ValueError: one line that names the key or the file, and what to do.
    """
    path = Path(path)
    own, layer = load_run_file(path), parse_overrides(overrides)
    parts = OmegaConf.create(merge(own.pop('parts', {}), layer.pop('parts', {})))
    folder = path.parent / 'parts' if (path.parent / 'parts').is_dir() else YAMLS / 'studies' / 'parts'
    study, where = merge(*(load_run_file(file) for file in part_files(parts, folder, path)), own, layer), path.name
    check_keys(study, KEYS, where)
    for key in ('size', 'seeds', 'arms'):
        if not study.get(key):
            raise ValueError(f'{where}: no {key}; a study needs size, seeds and arms')
    for key in ('arms', 'set', 'tuning', 'where', 'report', 'elastic'):
        check_mapping(f'{where}: {key}', study.get(key) or None)
    report = {key: value for key, value in (study.get('report') or {}).items() if value is not None}
    check_keys(report, REPORT_KEYS, f'{where}: report')
    if isinstance(report.get('baselines'), str):
        report['baselines'] = [report['baselines']]
    efficiency = report.get('data_efficiency')
    if efficiency and not all(efficiency.get(key) for key in ('arms', 'baseline')):
        raise ValueError(f'{where}: report.data_efficiency: needs arms: [...] and baseline: ...')
    run_files, sets = _arms(study, where)
    for key in ('elastic', 'report.baselines', 'report.data_efficiency.arms', 'report.data_efficiency.baseline'):
        _check_arms(f'{where}: {key}', OmegaConf.select(OmegaConf.create(study), key), {**study['arms'], **run_files})
    return Study(
        name=path.stem,
        title=study.get('title') or path.stem,
        where=_where(study.get('where') or {}, where),
        seeds=_seeds(study['seeds'], f'{where}: seeds'),
        run_files=run_files,
        sets=sets,
        tuning=_tuning(study.get('tuning'), where),
        elastic=study.get('elastic') or {},
        report=report,
    )


def dotlist(settings: Mapping[str, Any], prefix: str = '') -> list[str]:
    """Nested keys as ``a.b=value``, in the form that OmegaConf reads back to the same values."""
    flat = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat += dotlist(value, f'{prefix}{key}.')
        else:
            flat.append(f'{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}')
    return flat


def merge(*layers: Any) -> dict[str, Any]:
    """Nested keys laid over one another, the last one on top."""
    merged = OmegaConf.to_container(OmegaConf.merge(*layers))
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def grid_settings(grid: Mapping[str, Sequence[Any]], where: str) -> dict[str, dict[str, Any]]:
    """Every combination of the values in ``{dotted key: [value, ...]}``, by a name such as ``lr=0.003,delta``."""
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f'{where}: {key}: a grid needs a list of values')
    settings = {}
    for values in itertools.product(*grid.values()):
        pairs = dict(zip(grid, values, strict=True))
        name = ','.join(
            value if isinstance(value, str) else f'{key.rsplit(".", 1)[-1]}={json.dumps(value)}'
            for key, value in pairs.items()
        )
        settings[name] = _nested(pairs)
    return settings


def _nested(pairs: Mapping[str, Any]) -> dict[str, Any]:
    nested = OmegaConf.create({})
    for key, value in pairs.items():
        OmegaConf.update(nested, key, value)
    return merge(nested)


def _arms(study: dict[str, Any], where: str) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    run_files, sets = {}, {}
    for arm, options in study['arms'].items():
        if options is None:  # An override took the arm out.
            continue
        check_keys(options, ('run', 'set', 'grid'), f'{where}: arms.{arm}')
        file = YAMLS / f'{options.get("run", arm)}_{study["size"]}.yaml'
        if not file.is_file():
            there = sorted(path.stem for path in YAMLS.glob('*.yaml'))
            raise ValueError(f'{where}: arms.{arm}: no run file {file.name}{did_you_mean(file.stem, there)}')
        grid = grid_settings(options.get('grid') or {}, f'{where}: arms.{arm}.grid')
        for setting, values in grid.items():
            name = f'{arm},{setting}' if setting else arm
            run_files[name] = file
            sets[name] = merge(study.get('set') or {}, options.get('set') or {}, values)
    return run_files, sets


def _check_arms(where: str, named: Any, arms: Mapping[str, Any]) -> None:
    for arm in [named] if isinstance(named, str) else named or []:
        if arm not in arms:
            raise ValueError(f'{where}: no arm {arm!r}{did_you_mean(arm, list(arms))}')


def _where(options: dict[str, Any], where: str) -> Where:
    check_keys(options, ('place', 'at_once', 'launcher'), f'{where}: where')
    place = Where(**options)
    check_choice(f'{where}: where.place', place.place, PLACES)
    if place.at_once is not None and not (isinstance(place.at_once, int) and place.at_once > 0):
        raise ValueError(f'{where}: where.at_once: {place.at_once!r} is not a number of runs')
    return place


def _seeds(seeds: Any, where: str) -> list[int]:
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f'{where}: {seeds!r} is not a list of whole numbers')
    if len(set(seeds)) < len(seeds):
        raise ValueError(f'{where}: {seeds} names a seed twice')
    return seeds


def _tuning(options: dict[str, Any] | None, where: str) -> Tuning | None:
    if not options:
        return None
    check_keys(options, ('seeds', 'set', 'grid', 'settings'), f'{where}: tuning')
    settings = dict(options.get('settings') or {})
    if options.get('grid'):
        settings |= grid_settings(options['grid'], f'{where}: tuning.grid')
    if not settings:
        raise ValueError(f'{where}: tuning: no settings; give grid: {{key: [values]}} or settings: {{name: {{}}}}')
    return Tuning(_seeds(options.get('seeds'), f'{where}: tuning.seeds'), options.get('set') or {}, settings)


def compare_configs(before: DictConfig, now: DictConfig) -> str | None:
    """The first key in which two configs differ, with both values; None where they are the same."""
    flat_before, flat_now = (dict(item.split('=', 1) for item in dotlist(merge(c))) for c in (before, now))
    for key in sorted(flat_before.keys() | flat_now.keys()):
        if flat_before.get(key) != flat_now.get(key):
            return f'{key} was {flat_before.get(key)} and is now {flat_now.get(key)}'
    return None
