"""Loss of each kind of token of the k-hop task: ``python -m research k-hop answers STUDY_FOLDER``.

Writes ``answers.csv`` beside the study's tables, from the checkpoints of its main runs. Runs that are already in it are
not measured again. The task: ``research.k_hop.data``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.progress import track

from itt_composer.atomic import write_text
from itt_composer.evaluation.held_out import rows_by_domain
from itt_composer.export.load import as_ours, load
from itt_composer.model import ITTForCausalLM
from itt_composer.one_line import one_line_errors
from research.figures.difficulty import next_token_loss
from research.k_hop.data import DOMAINS, SEQ_LEN, positions
from research.study.results import ANSWERS, RESULTS, read_table

COLUMNS = ['run', 'variant', 'seed', 'hops', 'selection', 'kind', 'loss']


def measure(model: ITTForCausalLM, data: Path, sequences: int) -> pd.DataFrame:
    """Return the mean loss of each kind of token, by ``hops``, ``selection`` and ``kind``.

    Args:
        model: one that routes no tokens is measured once, as ``threshold``.
        data: the folder of ``make k-hop-data``.
        sequences: of the validation data, per number of hops.

    Raises:
        ValueError: the data are of another text.
    """
    domains = rows_by_domain(data, sequences, model.config)
    if set(domains) != set(DOMAINS) or any(rows_NS.shape[1] != SEQ_LEN for rows_NS in domains.values()):
        raise ValueError(f'{data}: not the text of the k-hop task; run: python -m research k-hop data --out {data}')
    table = []
    for selection in ('threshold', 'top_k'):
        if model.selection is not None:
            model.set_thinking(selection=selection)
        elif selection != 'threshold':
            continue
        for domain, hops in DOMAINS.items():
            loss_NS = next_token_loss(model, domains[domain], batch_size=32)
            for kind, places in positions().items():
                # The loss at s is that of the token at s + 1.
                loss = float(loss_NS[:, [place - 1 for place in places]].mean())
                table.append({'hops': hops, 'selection': selection, 'kind': kind, 'loss': loss})
    return pd.DataFrame(table)


def main(
    study: Annotated[Path, typer.Argument(help='The folder of a study, runs/studies/k_hop.')],
    data: Annotated[Path, typer.Option(help='Folder of `make k-hop-data`.')] = Path('data/hops'),
    sequences: Annotated[int, typer.Option(min=1, help='Validation sequences per number of hops.')] = 1000,
) -> None:
    """Measure the loss of each kind of token for each model of a k-hop study."""
    with one_line_errors('k-hop answers'):
        runs = read_table(study / RESULTS).query('stage == "main"')[['run', 'variant', 'seed']].drop_duplicates()
        file = study / ANSWERS
        known = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=COLUMNS)
        tables = [known[known.run.isin(runs.run)]]
        for run, variant, seed in track(list(runs.itertuples(index=False))):
            path = study / 'runs' / run / 'checkpoints'
            if run in set(known.run):
                continue
            if not path.is_dir():
                print(f'{run}: left out; its checkpoints are missing in {path}')
                continue
            model = as_ours(load(path)[0], path)
            tables.append(measure(model, data, sequences).assign(run=run, variant=variant, seed=seed)[COLUMNS])
            # After each model: one takes minutes.
            write_text(pd.concat(tables).to_csv(index=False, float_format='%.6g'), file)
        print(file)
