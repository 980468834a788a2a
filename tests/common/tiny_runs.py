"""Short trainings of a tiny model through Composer, for the tests of algorithms and callbacks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from composer import Algorithm, Callback, Trainer
from composer.core import Time, Timestamp
from composer.loggers import InMemoryLogger, LoggerDestination
from composer.utils import dist
from torch.utils.data import DataLoader

from common.algorithm_settings import TINY_ITT
from itt_composer.config.run_file import resolve
from itt_composer.training.composer_model import ComposerITTForCausalLM

S, BATCH, BATCHES = 16, 4, 8


class Images(LoggerDestination):
    """Keeps the pictures it is given, as wandb or TensorBoard would."""

    def __init__(self):
        self.images = {}

    def log_images(
        self, images, name='Images', channels_last=False, step=None, masks=None, mask_class_labels=None, use_table=True
    ):
        assert channels_last and not use_table  # wandb hangs over tables
        self.images.setdefault(name, []).append((step, images))


def tiny_model(**keys):
    torch.manual_seed(0)
    return ComposerITTForCausalLM(**{**TINY_ITT, **keys})


def batches(count=BATCHES):
    tokens = torch.randint(64, (count * BATCH, S), generator=torch.Generator().manual_seed(1))
    return [{'input_ids': row, 'labels': row} for row in tokens]


def plain_loader():
    rows = batches()
    return DataLoader(rows, batch_size=BATCH // dist.get_world_size(), sampler=dist.get_sampler(rows, shuffle=False))


def trainer(
    model, parts=(), *, max_duration=f'{BATCHES}ba', microbatch=2, loggers=(), train_dataloader=None, **options
):
    return Trainer(
        model=model,
        train_dataloader=plain_loader() if train_dataloader is None else train_dataloader,
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-2),
        max_duration=max_duration,
        device_train_microbatch_size=microbatch,
        algorithms=[part for part in parts if isinstance(part, Algorithm)],
        callbacks=[part for part in parts if isinstance(part, Callback)],
        loggers=list(loggers),
        seed=7,
        progress_bar=False,
        **options,
    )


def fit(model, parts=(), **options):
    """Train, and return what was logged, as {metric: [(batch, value), ...]}."""
    memory = InMemoryLogger()
    run = trainer(model, parts, loggers=[memory, *options.pop('loggers', [])], **options)
    run.fit()
    run.close()
    return {name: [(t.batch.value, value) for t, value in series] for name, series in memory.data.items()}


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fake_state(batch=0, *, max_duration='100ba', epoch_batches=20, tokens_per_batch=64):
    """A trainer's state after ``batch`` batches."""
    now, before = (
        Timestamp(
            epoch=b // epoch_batches,
            batch=b,
            batch_in_epoch=b % epoch_batches,
            sample=4 * b,
            token=tokens_per_batch * b,
        )
        for b in (batch, batch - 1 if batch else 0)
    )
    return SimpleNamespace(
        timestamp=now,
        previous_timestamp=before if batch else None,
        max_duration=Time.from_timestring(max_duration),
        dataloader_len=Time.from_timestring(f'{epoch_batches}ba'),
    )


TINY_RUN_FILE = Path(__file__).resolve().parents[2] / 'yamls' / 'itt_x4_tiny.yaml'
TINY_RUN = (
    *('max_seq_len=32', 'global_train_batch_size=4', 'device_train_microbatch_size=4', 'model.hidden_size=32'),
    *('model.intermediate_size=64', 'model.num_hidden_layers=2', 'train_loader.dataset.num_canonical_nodes=4'),
    *('log_to_console=false', 'eval_interval=100ba', 'save_interval=2ba', 'algorithms.capacity_warmup.duration=4ba'),
    # Their pictures take most of the time of a run this short.
    *('callbacks.router_weights=null', 'callbacks.step_encodings=null'),
)


def tiny_config(data, runs, *overrides):
    """The config of a run of seconds, of the smallest ITT training config on ``write_data``'s rows."""
    return resolve(TINY_RUN_FILE, [*TINY_RUN, f'variables.data={data}', f'variables.runs={runs}', *overrides])
