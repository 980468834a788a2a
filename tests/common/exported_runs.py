"""Runs of two batches with checkpoints in a run's layout, and what their models gave at the end."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from composer import Trainer
from composer.optim import DecoupledAdamW
from composer.utils import dist
from llmfoundry.registry import callbacks as callback_registry
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from common.shards import write_tokenizer
from itt_composer.model import thinking_layers
from itt_composer.training.composer_model import ComposerITTForCausalLM

SHAPE = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    embedding_initializer_range=0.5,
)
FAMILIES = {
    'llama': SHAPE,
    'loop': dict(SHAPE, thinking='loop', thinking_steps=2),
    'itt': dict(SHAPE, thinking='itt', thinking_steps=2, router_initializer_range=0.1),
}
IDS = torch.randint(3, 60, (3, 24), generator=torch.Generator().manual_seed(1))
CHECKPOINT = Path('checkpoints', 'ep0-ba2-rank0.pt')


def train(family: str, runs: Path, sharded: bool = False) -> tuple[list, dict[int, list[float]]]:
    """Two batches with checkpoints, foundry's callback among them; the trained model's logits and thresholds."""
    tokenizer = runs / f'tokenizer{os.environ.get("RANK", 0)}'
    write_tokenizer(tokenizer)
    torch.manual_seed(5)
    model = ComposerITTForCausalLM(AutoTokenizer.from_pretrained(tokenizer), **FAMILIES[family])
    if sharded:
        os.environ['FSDP_VERSION'] = '2'
    folder = runs / family / 'checkpoints'
    checkpointer = callback_registry.get('hf_checkpointer')(
        save_folder=str(folder), save_interval='2ba', precision='bfloat16' if family == 'itt' else 'float32'
    )
    rows = [{'input_ids': ids, 'labels': ids} for ids in IDS[: 4 if sharded else 2]]
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(rows, batch_size=1, sampler=dist.get_sampler(rows)),
        optimizers=DecoupledAdamW(model.parameters(), lr=1e-2),
        max_duration='2ba',
        callbacks=[] if sharded else [checkpointer],
        parallelism_config={'fsdp': {'state_dict_type': 'sharded'}} if sharded else None,
        precision='fp32',
        device='cpu',
        progress_bar=False,
        run_name=family,
        save_folder=str(folder),
        save_interval='2ba',
    )
    trainer.fit()
    inner = trainer.state.model.model
    with torch.no_grad():
        logits = inner.eval()(IDS).logits
    thresholds = {i: layer.threshold_T.tolist() for i, layer in thinking_layers(inner).items()}
    trainer.close()
    return logits.tolist(), thresholds
