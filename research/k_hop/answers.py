"""What each kind of token costs the models of the hops study: ``python -m research k-hop answers STUDY_FOLDER``.

Writes ``answers.csv`` beside the study's tables, from the checkpoints of its main runs; what is in it of a run is left.
The task: ``research.k_hop.data``.
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
from research.figures.difficulty import next_token_loss
from research.k_hop.data import DOMAINS, SEQ_LEN, positions
from research.study.results import ANSWERS, RESULTS, read_table

COLUMNS = ['run', 'arm', 'seed', 'hops', 'rule', 'kind', 'loss']


def measure(model: ITTForCausalLM, data: Path, rows: int) -> pd.DataFrame:
    """Mean nats of a token of each kind, under each rule: ``hops``, ``rule``, ``kind``, ``loss``.

    Args:
        model: a model without routing has the one rule ``causal``.
        data: what ``make hops`` wrote.
        rows: of each number of hops, from the validation rows.

    Raises:
        ValueError: rows of another text.
    """
    domains = rows_by_domain(data, rows, model.config)
    if set(domains) != set(DOMAINS) or any(rows_NS.shape[1] != SEQ_LEN for rows_NS in domains.values()):
        raise ValueError(f'{data}: not the text of the hops task; make it: make hops OUT={data}')
    table = []
    for rule, selection in {'causal': 'threshold', 'looks ahead': 'top_k'}.items():
        if model.selection is not None:
            model.set_thinking(selection=selection)
        elif rule != 'causal':
            continue
        for domain, hops in DOMAINS.items():
            loss_NS = next_token_loss(model, domains[domain], batch_size=32)
            for kind, places in positions().items():
                # The loss at s is that of the token at s + 1.
                loss = float(loss_NS[:, [place - 1 for place in places]].mean())
                table.append({'hops': hops, 'rule': rule, 'kind': kind, 'loss': loss})
    return pd.DataFrame(table)


def main(
    study: Annotated[Path, typer.Argument(help='The folder of a study, runs/studies/hops_cpu.')],
    data: Annotated[Path, typer.Option(help='What `make hops` wrote.')] = Path('data/hops'),
    rows: Annotated[int, typer.Option(min=1, help='Validation rows of each number of hops.')] = 1000,
) -> None:
    """Measure what each kind of token costs each model of a hops study."""
    try:
        runs = read_table(study / RESULTS).query('stage == "main"')[['run', 'arm', 'seed']].drop_duplicates()
        file = study / ANSWERS
        known = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=COLUMNS)
        tables = [known[known.run.isin(runs.run)]]
        for run, arm, seed in track(list(runs.itertuples(index=False))):
            path = study / 'runs' / run / 'checkpoints'
            if run in set(known.run):
                continue
            if not path.is_dir():
                print(f'{run}: left out, as its checkpoints are not in {path}')
                continue
            model = as_ours(load(path)[0], path)
            tables.append(measure(model, data, rows).assign(run=run, arm=arm, seed=seed)[COLUMNS])
            # After each model: some minutes go into one.
            write_text(pd.concat(tables).to_csv(index=False, float_format='%.6g'), file)
        print(file)
    except (ValueError, OSError) as error:
        raise SystemExit(f'study hops: {error}') from None
