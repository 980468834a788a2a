"""Short trainings of small models through Composer on one rank or several, each rank a fork over gloo."""

from __future__ import annotations

import os
import signal
from typing import NamedTuple

import torch
from composer import Trainer
from composer.core import Callback, Evaluator
from composer.loggers import InMemoryLogger
from composer.utils import dist
from torch.utils.data import DataLoader

from common.ranks import use_fsdp2_over_gloo
from itt_composer.model import thinking_layers
from itt_composer.model.sharding import whole
from itt_composer.training.composer_model import ComposerITTForCausalLM
from itt_composer.training.fused_adamw import DecoupledAdamW as FusedDecoupledAdamW

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ITT = dict(SHAPE, thinking='itt', thinking_steps=2, router_initializer_range=0.05)
S, GLOBAL_BATCH, BATCHES = 24, 8, 6
SHARDED = {'activation_checkpointing': True, 'state_dict_type': 'sharded'}


class Rows(torch.utils.data.Dataset):
    """Rows that can be learnt: each token follows from the one before."""

    def __len__(self):
        return GLOBAL_BATCH * BATCHES

    def __getitem__(self, i):
        return {'input_ids': (torch.arange(S) * 7 + i) % 61, 'labels': (torch.arange(S) * 7 + i) % 61}


class DieAt(Callback):
    """SIGKILL, as the machine would, after a batch whose checkpoint is written."""

    def __init__(self, batch: int):
        self.batch = batch

    def batch_start(self, state, logger):
        if state.timestamp.batch == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def batches():
    device_batch = GLOBAL_BATCH // dist.get_world_size()
    rows = Rows()
    sampler = dist.get_sampler(rows, shuffle=False)
    return DataLoader(rows, batch_size=device_batch, sampler=sampler)


class GradientNorms(Callback):
    """The norm of the whole gradient, of all ranks, after each batch."""

    def __init__(self):
        self.norms = []

    def after_train_batch(self, state, logger):
        squares = [whole(p.grad).square().sum() for p in state.model.parameters() if p.grad is not None]
        self.norms.append(torch.stack(squares).sum().sqrt().item())


class Run(NamedTuple):
    """What a run did, batch by batch, and the thresholds that it ended with."""

    losses: list[float]
    gradient_norms: list[float]
    thresholds: list[list[float]]
    updates: list[int]
    sharded: int
    logged: dict[str, float]


def train(
    options,
    folder=None,
    fsdp=None,
    microbatch=GLOBAL_BATCH,
    die_at=None,
    duration=f'{BATCHES}ba',
    compile_config=None,
    callbacks=(),
    evaluate=False,
    lr=3e-3,
    optimizer=FusedDecoupledAdamW,
) -> Run:
    """A short run; with a folder it saves, and goes on from what it finds there."""
    torch.manual_seed(11)
    memory = InMemoryLogger()
    model = ComposerITTForCausalLM(**options)
    if fsdp is not None:
        use_fsdp2_over_gloo()
    norms = GradientNorms()
    evaluator = Evaluator(label='rows', dataloader=batches(), metric_names=['LanguageCrossEntropy'])
    trainer = Trainer(
        model=model,
        train_dataloader=batches(),
        eval_dataloader=evaluator if evaluate else None,
        eval_interval='3ba',
        optimizers=optimizer(model.parameters(), lr=lr, weight_decay=0.0),
        max_duration=duration,
        loggers=[memory],
        callbacks=[norms, *([DieAt(die_at)] if die_at is not None else []), *callbacks],
        device_train_microbatch_size=microbatch,
        parallelism_config={'fsdp': fsdp} if fsdp is not None else None,
        compile_config=compile_config,
        precision='fp32',
        device='cpu',
        seed=3,
        progress_bar=False,
        run_name='test',
        save_folder=None if folder is None else str(folder),
        save_interval='2ba',
        autoresume=folder is not None,
    )
    trainer.fit()
    layers = list(thinking_layers(trainer.state.model).values())
    for layer in layers:
        layer.commit_thresholds()
    run = Run(
        losses=[float(value) for _, value in memory.data['loss/train/total']],
        gradient_norms=norms.norms,
        thresholds=[layer.threshold_T.tolist() for layer in layers],
        updates=[int(layer.threshold_updates) for layer in layers],
        sharded=sum(type(m).__name__.startswith('FSDP') for m in trainer.state.model.modules()),
        logged={
            key: float(values[-1][1])
            for key, values in memory.data.items()
            if key.startswith(('causal_gap', 'metrics'))
        },
    )
    trainer.close()
    return run
