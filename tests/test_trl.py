"""TRL's SFTTrainer with an ITT made from a pretrained model."""

from __future__ import annotations

import pytest
import torch
from common.pretrained import questions, write_pretrained
from transformers import AutoTokenizer

from itt_composer.config.examples import plain
from itt_composer.model import ITTForCausalLM, thinking_layers

trl = pytest.importorskip('trl', reason='needs trl, for example 0.19.1')
datasets = pytest.importorskip('datasets')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_pretrained(tmp_path_factory.mktemp('pretrained'))


def tuned(folder, out, batch, **options):
    rows = [plain(row) for row in questions(4)]
    examples = [{'prompt': row['prompt'], 'completion': row['response']} for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    arguments = trl.SFTConfig(
        str(out), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch,
        optim='sgd', learning_rate=1.0, lr_scheduler_type='constant', max_grad_norm=0, report_to=[], use_cpu=True,
        save_strategy='no', disable_tqdm=True, bf16=False, max_length=160, **options,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        ITTForCausalLM.from_pretrained_dense(folder, thinking='itt', thinking_steps=1),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.model


def test_accumulation_and_checkpointing_change_nothing(folder, tmp_path):
    expected = dict(tuned(folder, tmp_path, 4).named_parameters())
    phi = thinking_layers(tuned(folder, tmp_path, 4))[0].phi_TD
    assert phi[1].abs().max() > 0
    for options in ({'batch': 1}, {'batch': 2, 'gradient_checkpointing': True}):
        for name, parameter in tuned(folder, tmp_path, **options).named_parameters():
            torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=1e-4, msg=name)
