"""A study's results as one tidy table: a row for each evaluation of each run, and for each domain at the last."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from itt_composer.analysis.tensorboard import Curve, RunLogs, mean_curve
from itt_composer.atomic import write_text
from itt_composer.config.examples import examples
from itt_composer.config.finetuning import LOADER, examples_file, is_finetuning
from itt_composer.flops import TRAINING_TO_FORWARD, Decoder, exact_flops, paper_flops, parameters
from itt_composer.training.manifest import manifest_path, read_manifest
from research.study.study_file import Run, Tuning

RESULTS, ELASTIC, ANSWERS, MANIFEST = 'results.csv', 'elastic.csv', 'answers.csv', 'manifest.json'
ALL_DOMAINS = 'all'
COLUMNS = {
    'study': 'the study file',
    'run': 'the run’s name',
    'stage': 'main, or tuning for a run of the sweep',
    'variant': 'what is compared',
    'setting': 'the values of the sweep; empty in the main stage',
    'seed': 'of the initial weights and the order of the batches',
    'parameters': 'of the model',
    'domain': 'all: mean over the validation sequences; or one domain, at the last evaluation only',
    'batch': 'batches trained',
    'tokens': 'tokens trained on, without padding',
    'paper_flops': 'training FLOPs so far by the paper’s count (three times a forward pass)',
    'exact_flops': 'the same by an exact count; both follow the capacity warm-up',
    'loss_threshold': 'nats per token under threshold routing (causal)',
    'loss_top_k': 'the same under the training selection (non-causal); empty where no tokens are routed',
    'loss_train': 'mean training loss since the previous evaluation',
    'seconds': 'of training so far, without start-up and evaluation',
}


def collect(study: str, run: Run, config: DictConfig) -> pd.DataFrame | None:
    """Return the rows of a run from its TensorBoard files; None for a run that has not reached its end.

    A run that stopped because its loss was not finite has an empty last loss, which counts as infinite.

    Args:
        study: its name.
        run: which run it is.
        config: of the run, as ``run_file.resolve`` returns it.

    Raises:
        ValueError: ``max_duration`` is not in batches.
    """
    total = training_batches(config)
    folder = Path(config.variables.runs) / 'tensorboard' / run.name
    if not folder.is_dir():
        return None
    logs = RunLogs(folder)
    losses = {domain: curve for domain, curve in logs.domain_losses().items() if domain != 'merged'}
    rows = {domain: count for domain, count in evaluation_rows(config).items() if domain != 'merged'}
    if has_diverged(config):
        losses = {domain: {**losses.get(domain, {}), total: math.nan} for domain in rows}
    if not losses or any(total not in curve for curve in losses.values()):
        return None
    rows = {domain: count for domain, count in rows.items() if domain in losses}
    model = OmegaConf.to_container(config.model)
    assert isinstance(model, dict)
    decoder = Decoder.from_model_config({str(key): value for key, value in model.items()})
    ahead = {d: curve for d, curve in logs.training_selection_losses(decoder.selection).items() if d in rows}
    curve, ahead_curve = mean_curve(losses, rows), mean_curve(ahead, rows) if ahead else {}
    train, hours = logs.curve('loss/train/total'), logs.curve('time/train')
    tokens = _tokens(config, logs, total)
    flops = _training_flops(decoder, config, logs, tokens)
    table = []
    for before, batch in pairwise([0, *curve]):
        shared = {
            'study': study,
            'run': run.name,
            'stage': run.stage,
            'variant': run.variant,
            'setting': run.setting,
            'seed': run.seed,
            'parameters': parameters(decoder).total,
            'batch': batch,
            'tokens': tokens[batch],
            'paper_flops': flops[batch][0],
            'exact_flops': flops[batch][1],
            'seconds': 3600 * max((value for step, value in hours.items() if step <= batch), default=math.nan),
        }
        table.append(
            {
                **shared,
                'domain': ALL_DOMAINS,
                'loss_threshold': curve[batch],
                'loss_top_k': ahead_curve.get(batch),
                'loss_train': fmean([value for step, value in train.items() if before <= step < batch] or [math.nan]),
            }
        )
    for domain, domain_curve in losses.items():
        last_ahead = ahead[domain].get(total) if domain in ahead else None
        table.append({**shared, 'domain': domain, 'loss_threshold': domain_curve[total], 'loss_top_k': last_ahead})
    # Numbers throughout, also where a column is empty.
    return pd.DataFrame(table, columns=list(COLUMNS)).astype({'loss_top_k': float, 'loss_train': float})


def has_diverged(config: DictConfig) -> bool:
    """Whether a run stopped because its loss or weights were not finite."""
    path = manifest_path(config)
    return path is not None and 'not_finite' in (read_manifest(path) or {})


def evaluation_rows(config: DictConfig) -> dict[str, int]:
    """Return the sequences of each evaluation set: those of its examples, of the data's manifest or of its shards."""
    manifest, rows = config.variables.get('data_manifest'), {}
    for loader in config.eval_loader:
        if loader.name == LOADER:
            dataset = loader.dataset
            rows[loader.label] = len(list(examples(examples_file(dataset), dataset.get('preprocessing_fn'))))
        elif manifest and loader.label in manifest.domains:
            rows[loader.label] = manifest.domains[loader.label].validation.rows
        else:
            index = json.loads((Path(loader.dataset.local) / 'index.json').read_text())
            rows[loader.label] = sum(shard['samples'] for shard in index['shards'])
    if (batches := config.get('eval_subset_num_batches', -1)) > 0:
        rows = {label: min(count, batches * config.device_eval_batch_size) for label, count in rows.items()}
    return rows


def read_table(path: Path) -> pd.DataFrame:
    """Read a table of :func:`write_table`.

    Raises:
        ValueError: the file is missing, or is no table of a study.
    """
    if not path.is_file():
        raise ValueError(f'{path}: no results; train the study first')
    table = pd.read_csv(path, keep_default_na=True, dtype={'setting': str, 'variant': str, 'domain': str})
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise ValueError(f'{path}: no column {missing[0]}; this is not the table of a study')
    return table.fillna({'setting': ''})


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table atomically."""
    write_text(table.to_csv(index=False, float_format='%.7g'), path)


def final(table: pd.DataFrame) -> pd.DataFrame:
    """Return the last evaluation of each run, over all domains."""
    whole = table[table.domain == ALL_DOMAINS]
    return whole[whole.batch == whole.groupby('run').batch.transform('max')]


def best_settings(table: pd.DataFrame, tuning: Tuning) -> dict[str, str]:
    """Return variant to the setting of its sweep with the lowest mean final loss under threshold routing.

    A variant that lacks a run of its sweep, or that diverged at every setting, is left out.
    """
    sweep = final(table[table.stage == 'tuning'])
    sweep = sweep[sweep.setting.isin(list(tuning.settings)) & sweep.seed.isin(tuning.seeds)]
    best = {}
    for variant, runs in sweep.groupby('variant'):
        means = runs.fillna({'loss_threshold': math.inf}).groupby('setting').loss_threshold.mean()
        if len(runs) == len(tuning.settings) * len(tuning.seeds) and math.isfinite(means.min()):
            best[str(variant)] = str(means.idxmin())
    return best


def training_batches(config: DictConfig) -> int:
    """Return the batches of a complete training.

    Raises:
        ValueError: ``max_duration`` is not in batches.
    """
    duration = str(config.max_duration)
    if not duration.removesuffix('ba').isdigit():
        raise ValueError(
            f'max_duration: {duration}; runs of a study are compared at equal batches; set 1000ba, for example'
        )
    return int(duration.removesuffix('ba'))


def _tokens(config: DictConfig, logs: RunLogs, total: int) -> list[int]:
    """Return the tokens after 0, 1, ... batches; examples differ in length, so theirs are logged."""
    if not is_finetuning(config):
        return [batch * config.global_train_batch_size * config.max_seq_len for batch in range(total + 1)]
    logged, tokens = logs.curve('time/token'), [0]
    for batch in range(total):
        tokens.append(int(logged.get(batch, tokens[-1])))
    return tokens


def _training_flops(
    decoder: Decoder, config: DictConfig, logs: RunLogs, tokens: Sequence[int]
) -> list[tuple[float, float]]:
    """Return training FLOPs, by the paper's count and exact, after 0, 1, ... batches with their own capacities.

    Sequences that differ in length count as long as they are in the mean.
    """
    total, T = len(tokens) - 1, decoder.steps
    S = round(tokens[-1] / (total * config.global_train_batch_size))
    capacity = {int(name): curve for name, curve in logs.curves('capacity/step').items()}
    per_sequence: dict[tuple[float, ...], tuple[float, float]] = {}
    spent = [(0.0, 0.0)]
    ratios = tuple(decoder.token_ratios or [])
    for batch in range(total):
        ratios = tuple(_at(capacity.get(t, {}), batch, ratios[t - 1]) for t in range(1, T + 1))
        if ratios not in per_sequence:
            forward = paper_flops(decoder, S, ratios), float(exact_flops(decoder, S, ratios).total)
            per_sequence[ratios] = forward
        paper, exact = per_sequence[ratios]
        sequences = TRAINING_TO_FORWARD * config.global_train_batch_size
        spent.append((spent[-1][0] + sequences * paper, spent[-1][1] + sequences * exact))
    return spent


def _at(curve: Mapping[int, float] | Curve, batch: int, before: float) -> float:
    """Return a logged capacity; where a killed run lost the line, the one before."""
    return min(1.0, round(curve[batch], 6)) if batch in curve else before
