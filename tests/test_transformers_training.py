"""Training in other people's loops: the loss of a batch in parts, and gradient checkpointing."""

import copy
import itertools

import pytest
import torch
from common.small_models import KV, MODELS, SHAPE, build
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from itt_composer.model import ITTForCausalLM


def sequences_of_unequal_length() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    sequences = []
    for length in (6, 31, 8, 20):
        ids = torch.randint(2, 97, (32,))
        labels = ids.clone()
        labels[length:] = -100
        sequences.append(dict(input_ids=ids, labels=labels))
    return sequences


def trained(model, sequences, per_pass: int, folder) -> dict[str, torch.Tensor]:
    """The parameters after one step of SGD with Hugging Face's Trainer."""
    model = copy.deepcopy(model).train()
    arguments = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=per_pass, optim='sgd', learning_rate=1.0,
        gradient_accumulation_steps=len(sequences) // per_pass, lr_scheduler_type='constant', max_grad_norm=0,
        report_to=[], use_cpu=True, save_strategy='no', disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=sequences).train()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_trainer_accumulates_as_with_llama(tmp_path):
    """Fact 1."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**{**SHAPE, 'num_hidden_layers': 2}))
    sequences = sequences_of_unequal_length()
    expected = trained(theirs, sequences, 4, tmp_path)
    ours = ITTForCausalLM.from_pretrained_dense(theirs)
    assert_close(trained(ours, sequences, 4, tmp_path), expected, rtol=1e-5, atol=1e-6)
    assert_close(trained(ours, sequences, 1, tmp_path), expected, rtol=1e-5, atol=1e-6)


def test_packed_texts_are_refused_and_padded_ones_are_not():
    model = build(thinking='itt').train()
    ids = torch.arange(8)[None]
    with pytest.raises(ValueError, match='position_ids: they start again within a sequence, as in packed texts'):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    # Transformers gives padding the position 1.
    padded = model(ids, mask, position_ids=torch.tensor([[1, 1, 0, 1, 2, 3, 4, 5]])).logits[:, 2:]
    assert_close(padded, model(ids[:, 2:]).logits)


@pytest.mark.parametrize('with_logits', [True, False])
def test_losses_of_parts_add_up(with_logits):
    model = build(thinking='itt', loss_chunk_tokens=7).train()
    sequences = sequences_of_unequal_length()
    ids, labels = (torch.stack([sequence[key] for sequence in sequences]) for key in ('input_ids', 'labels'))
    complete = model(ids, labels=labels).loss
    complete.backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    # The first token of each sequence has a label too, which nothing predicts.
    items = (labels[:, 1:] != -100).sum()
    parts = [model(ids[i:i + 1], labels=labels[i:i + 1], with_logits=with_logits, num_items_in_batch=items).loss
             for i in range(4)]  # fmt: skip
    sum(parts).backward()
    assert_close(sum(parts), complete)
    assert_close([parameter.grad for parameter in model.parameters()], expected)


CHECKPOINTED = {
    'dense': {},
    'loop': dict(thinking='loop', thinking_steps=2),
    'residual_scale': dict(thinking='residual_scale'),
    'itt blocks': MODELS['itt blocks refresh'],
    **{
        f'itt {kv} {selection}': dict(thinking='itt', thinking_kv=kv, selection=selection)
        for kv in KV
        for selection in ('top_k', 'threshold')
    },
}


@pytest.mark.parametrize(
    ('family', 'reentrant'),
    [
        *zip(CHECKPOINTED, itertools.cycle([None, False, True])),
        ('itt refresh top_k', None),
        ('itt refresh top_k', True),
    ],
)
def test_gradients_are_those_without_checkpointing(family, reentrant):
    model = build(**CHECKPOINTED[family]).train()
    ids = torch.randint(2, 97, (2, 19), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    calls = []
    for module in model.modules():
        if type(module).__name__ == 'DecoderBlock':
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    expected, passes = [parameter.grad for parameter in model.parameters()], len(calls)
    thresholds = {name: value.clone() for name, value in model.state_dict().items() if 'threshold' in name}

    model = build(**CHECKPOINTED[family]).train()
    for module in model.modules():
        if type(module).__name__ == 'DecoderBlock':
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    calls.clear()
    model.gradient_checkpointing_enable(None if reentrant is None else {'use_reentrant': reentrant})
    assert model.is_gradient_checkpointing
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert len(calls) == 2 * passes
    assert_close([parameter.grad for parameter in model.parameters()], expected, rtol=0, atol=0)
    state = model.state_dict()
    assert_close({name: state[name] for name in thresholds}, thresholds, rtol=0, atol=0)

    model.gradient_checkpointing_disable()
    calls.clear()
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert len(calls) == passes
