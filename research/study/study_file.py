"""Study files: which runs, where they run, and what is compared in the end.

    parts: {scale: cpu}                     # studies/parts/<kind>/<name>.yaml, merged in this order
    seeds: [17, 18, 19]
    variants:
      llama: {}                             # yamls/llama_<size>.yaml; without a size, yamls/llama.yaml
      delta: {run: itt_x4, set: {model: {combine: delta}}}

A run is a training config and ``key=value`` overrides, nothing else: what ``train.py`` would be given by hand.
Overrides are those of the scale, the study, the variant and the tuned setting, in that order, then the seed. The name
of the study is ``<file>_<scale>``. No torch is imported.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from itt_composer.checks import check_choice, check_file_name, check_keys, check_mapping, did_you_mean
from itt_composer.config.files import find_file, names, yamls_folder
from itt_composer.config.run_file import check_kinds, load_run_file, parse_overrides, part_files
from research.study.paper_numbers import paper_numbers
from research.study.settings import dotlist, grid_settings, merge

YAMLS = yamls_folder()
KEYS = ('title', 'size', 'where', 'seeds', 'set', 'variants', 'tuning', 'elastic', 'report')
REPORT_KEYS = ('baselines', 'comparisons', 'data_efficiency', 'paper', 'steps')
MAPPINGS = (
    *('variants', 'set', 'where', 'elastic', 'tuning', 'tuning.set', 'tuning.grid', 'tuning.settings'),
    *('report', 'report.data_efficiency', 'report.steps'),
)
PLACES = ('cpu', 'gpu', 'commands')


@dataclass(frozen=True)
class Where:
    """``cpu``: N runs concurrently, one core each. ``gpu``: on all GPUs. ``commands``: printed after ``launcher``."""

    place: str = 'cpu'
    concurrent: int | None = None
    """None: the number of cores or GPUs."""
    launcher: str = 'composer train.py'


@dataclass(frozen=True)
class Run:
    """One training. ``setting`` names the values of a tuning sweep, and is empty for the runs that are compared."""

    name: str
    variant: str
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
    """A sweep before the main runs: every variant with every setting; its main runs use its best one."""

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
    """Variant to its training config."""
    sets: dict[str, dict[str, Any]]
    """Variant to the keys that override its training config: the scale's, the study's and its own."""
    tuning: Tuning | None = None
    elastic: dict[str, int] = field(default_factory=dict)
    """Variant to the number of sequences on which it is evaluated with other token ratios (Table 2)."""
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def variants(self) -> list[str]:
        """Names of the variants, in the order of the file."""
        return list(self.run_files)

    def tuning_runs(self, runs: Path) -> list[Run]:
        """The sweep's runs; ``runs`` is the folder that holds every run of the study."""
        if self.tuning is None:
            return []
        found = []
        for variant in self.variants:
            for setting, values in self.tuning.settings.items():
                overrides = self._overrides(variant, self.tuning.set, values)
                found += [self._run(runs, variant, setting, seed, overrides) for seed in self.tuning.seeds]
        return found

    def main_runs(self, runs: Path, best: Mapping[str, str]) -> list[Run]:
        """The runs that are compared; with a sweep, those of the variants in ``best``, which maps them to a setting."""
        settings = self.tuning.settings if self.tuning else {}
        variants = [variant for variant in self.variants if variant in best or not settings]
        overrides = {
            variant: self._overrides(variant, settings[best[variant]] if settings else {}) for variant in variants
        }
        return [self._run(runs, variant, '', seed, overrides[variant]) for seed in self.seeds for variant in variants]

    def _overrides(self, variant: str, *layers: dict[str, Any]) -> list[str]:
        return dotlist(merge(self.sets[variant], *layers))

    def _run(self, runs: Path, variant: str, setting: str, seed: int, overrides: Sequence[str]) -> Run:
        name = _run_name(variant, setting, seed)
        overrides = (*overrides, f'seed={seed}', f'run_name={name}', f'variables.runs={runs}')
        return Run(name, variant, setting, seed, self.run_files[variant], overrides)


def _run_name(variant: str, setting: str, seed: int) -> str:
    name = '-'.join(filter(None, ['tuning' if setting else '', variant, setting, f's{seed}']))
    return re.sub(r'[^\w.=-]+', '_', name)


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file, with ``key=value`` overrides of its own keys and parts.

    Raises:
        ValueError: one line that names the key or the file, and what to do.
    """
    path = find_file(path, 'studies')
    where, own, layer = path.name, load_run_file(path), parse_overrides(overrides)
    named_parts = own.pop('parts', {}), layer.pop('parts', {})
    for parts in named_parts:
        check_mapping(f'{where}: parts', parts)
    folder = path.parent / 'parts' if (path.parent / 'parts').is_dir() else YAMLS / 'studies' / 'parts'
    merged_parts = merge(*(parts or {} for parts in named_parts))
    files = part_files(OmegaConf.create(merged_parts), folder, path)
    layers = [*map(load_run_file, files), own, layer]
    study: dict[str, Any] = {}
    for layer in layers:
        check_kinds(study, OmegaConf.to_container(layer), where)
        study = merge(study, layer)
    check_keys(study, KEYS, where)
    for key in ('seeds', 'variants'):
        if not study.get(key):
            raise ValueError(f'{where}: no {key}; a study needs seeds and variants')
    sections = OmegaConf.create(study)
    for key in MAPPINGS:
        check_mapping(f'{where}: {key}', OmegaConf.select(sections, key) or None)
    run_files, sets = _variants(study, layers, where)
    variants = {**study['variants'], **run_files}
    elastic = study.get('elastic') or {}
    _check_variants(f'{where}: elastic', elastic, variants)
    for variant, rows in elastic.items():
        if not (type(rows) is int and rows > 0):
            raise ValueError(f'{where}: elastic.{variant}: expected a number of sequences, got {rows!r}')
    loaded = Study(
        name='_'.join(filter(None, [path.stem, merged_parts.get('scale')])),
        title=study.get('title') or path.stem,
        where=_where(study.get('where') or {}, where),
        seeds=_seeds(study['seeds'], f'{where}: seeds'),
        run_files=run_files,
        sets=sets,
        tuning=_tuning(study, layers, where),
        elastic=elastic,
        report=_report(study.get('report') or {}, variants, where),
    )
    check_file_name(f'{where}: parts.scale', loaded.name)
    _check_names(loaded, where)
    return loaded


def _entries(section: str, study: dict[str, Any], layers: Sequence[Any], where: str) -> dict[str, dict[str, Any]]:
    """The entries of ``variants`` or of ``tuning.settings``, without those that a null of a later layer takes out."""
    entries = {}
    for name, options in (OmegaConf.select(OmegaConf.create(study), section) or {}).items():
        if not isinstance(name, str):
            raise ValueError(f'{where}: {section}: YAML reads a name as {name!r}, not as text; put it in quotes')
        check_mapping(f'{where}: {section}.{name}', options)
        if options is not None:
            entries[name] = merge(options)
        elif all((OmegaConf.select(layer, section) or {}).get(name) is None for layer in layers):
            raise ValueError(f'{where}: {section}.{name} is empty; write {name}: {{}}')
    return entries


def _variants(
    study: dict[str, Any], layers: Sequence[Any], where: str
) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    run_files, sets = {}, {}
    for variant, options in _entries('variants', study, layers, where).items():
        check_keys(options, ('run', 'set', 'grid'), f'{where}: variants.{variant}')
        for key in ('set', 'grid'):
            check_mapping(f'{where}: variants.{variant}.{key}', options.get(key))
        name = '_'.join(filter(None, [options.get('run', variant), study.get('size')]))
        file = YAMLS / f'{name}.yaml'
        if not file.is_file():
            nearest = did_you_mean(name, [*names(), *(f'sft/{known}' for known in names('sft'))])
            raise ValueError(f'{where}: variants.{variant}: no training config {name}.yaml{nearest}')
        grid = grid_settings(options.get('grid') or {}, f'{where}: variants.{variant}.grid')
        for setting, values in grid.items():
            name = f'{variant},{setting}' if setting else variant
            run_files[name] = file
            sets[name] = merge(study.get('set') or {}, options.get('set') or {}, values)
    if not run_files:
        raise ValueError(f'{where}: variants: every variant is removed; keep at least one')
    return run_files, sets


def _report(options: dict[str, Any], variants: Mapping[str, Any], where: str) -> dict[str, Any]:
    report = {key: value for key, value in options.items() if value is not None}
    where = f'{where}: report'
    check_keys(report, REPORT_KEYS, where)
    if isinstance(report.get('baselines'), str):
        report['baselines'] = [report['baselines']]
    _check_variants(f'{where}.baselines', report.get('baselines'), variants)
    for pair in report.get('comparisons') or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f'{where}.comparisons: expected pairs [variant, baseline], got {pair!r}')
        _check_variants(f'{where}.comparisons', pair, variants)
    if efficiency := report.get('data_efficiency'):
        for key in ('variants', 'baseline'):
            if not efficiency.get(key):
                raise ValueError(f'{where}.data_efficiency: needs variants: [...] and baseline: ...')
            _check_variants(f'{where}.data_efficiency.{key}', efficiency[key], variants)
    for family, steps in (report.get('steps') or {}).items():
        check_mapping(f'{where}.steps.{family}', steps)
        _check_variants(f'{where}.steps.{family}', list((steps or {}).values()), variants)
    if report.get('paper'):
        check_choice(f'{where}.paper', report['paper'], sorted(paper_numbers()))
    return report


def _check_variants(where: str, named: Any, variants: Mapping[str, Any]) -> None:
    for variant in [named] if isinstance(named, str) else named or []:
        if variant not in variants:
            raise ValueError(f'{where}: no variant {variant!r}{did_you_mean(str(variant), list(variants))}')


def _check_names(study: Study, where: str) -> None:
    """Two runs of one name would share a folder."""
    runs = [(variant, '', seed) for seed in study.seeds for variant in study.variants]
    if study.tuning:
        runs = [*itertools.product(study.variants, study.tuning.settings, study.tuning.seeds), *runs]
    by_name: dict[str, tuple[str, str, int]] = {}
    for run in runs:
        name = _run_name(*run)
        other = by_name.setdefault(name, run)
        if other is not run:
            both = ' and '.join(repr(' '.join(filter(None, one[:2]))) for one in (other, run))
            raise ValueError(f'{where}: {both} would both be called {name} on disk; rename one')


def _where(options: dict[str, Any], where: str) -> Where:
    check_keys(options, ('place', 'concurrent', 'launcher'), f'{where}: where')
    place = Where(**options)
    check_choice(f'{where}: where.place', place.place, PLACES)
    if place.concurrent is not None and not (isinstance(place.concurrent, int) and place.concurrent > 0):
        raise ValueError(f'{where}: where.concurrent: expected a number of runs, got {place.concurrent!r}')
    return place


def _seeds(seeds: Any, where: str) -> list[int]:
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f'{where}: expected a list of whole numbers, got {seeds!r}')
    if len(set(seeds)) < len(seeds):
        raise ValueError(f'{where}: {seeds} repeats a seed; remove one')
    return seeds


def _tuning(study: dict[str, Any], layers: Sequence[Any], where: str) -> Tuning | None:
    options = study.get('tuning')
    if not options:
        return None
    check_keys(options, ('seeds', 'set', 'grid', 'settings'), f'{where}: tuning')
    settings = _entries('tuning.settings', study, layers, where)
    if options.get('grid'):
        settings |= grid_settings(options['grid'], f'{where}: tuning.grid')
    if not settings:
        raise ValueError(f'{where}: tuning: no settings; set grid: {{key: [values]}} or settings: {{name: {{}}}}')
    return Tuning(_seeds(options.get('seeds'), f'{where}: tuning.seeds'), options.get('set') or {}, settings)
