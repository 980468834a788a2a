"""Fine-tuning of a pretrained model by ``itt train``, from its first evaluation to its resumption.

The oracle is transformers' model with the same weights, on texts that are joined here.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from common.composer_runs import train
from common.pretrained import answer_loss, write_pretrained, write_questions
from common.ranks import run_on_ranks
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from itt_composer.cli import app
from itt_composer.model import routing_state
from itt_composer.model.pretrained_dense import shape_options
from itt_composer.training.composer_model import ComposerITTForCausalLM
from itt_composer.training.renew_examples import renew_examples
from itt_composer.training.threshold_commit import ThresholdCommit, _sequences_across

ROWS = 12
TINY = (
    *('parts.machine=cpu', 'max_seq_len=160', f'global_train_batch_size={ROWS}', 'max_duration=1ba'),
    *(f'device_train_microbatch_size={ROWS}', 'loggers={inmemory: {}}', 'callbacks.causal_gap=null'),
    *('callbacks.router_weights=null', 'callbacks.step_encodings=null', 'optimizer.lr=3e-3', 'eval_interval=100ep'),
    *('algorithms.capacity_warmup=null', 'scheduler.t_warmup=0ba'),
)
# Adam's first step would otherwise be the gradient's sign, which rounding may change.
LINEAR = ('optimizer.eps=1.0', 'optimizer.lr=1.0')
LOSS, ANSWERS = 'loss/train/total', 'metrics/eval/test/LanguageCrossEntropy'


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    return write_pretrained(tmp_path_factory.mktemp('pretrained'))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp('gsm8k'), train=ROWS)


@pytest.fixture
def tune(pretrained, data, tmp_path, monkeypatch):
    """Run ``itt train sft/<name>``; returns the trainer, and what it logged as {metric: values}."""
    from llmfoundry import command_utils

    foundry_train, trainers = command_utils.train, []
    monkeypatch.setattr(command_utils, 'train', lambda config: trainers.append(foundry_train(config)))
    monkeypatch.chdir(tmp_path)

    def run(name, *overrides):
        given = (f'model.pretrained={pretrained}', f'variables.data={data}', f'variables.runs={tmp_path}/runs')
        app(['train', f'sft/{name}', *TINY, *given, *overrides], standalone_mode=False)
        trainer = trainers[-1]
        (memory,) = (logger for logger in trainer.logger.destinations if hasattr(logger, 'data'))
        return trainer, {key: [float(value) for _, value in values] for key, values in memory.data.items()}

    return run


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.state.model.state_dict().items()}


def test_an_itt_model_starts_as_the_dense_one_and_routes_its_ratios(tune, pretrained, data, monkeypatch):
    shares, after_load = [], ThresholdCommit.after_load

    def recorded(self, state, logger):
        after_load(self, state, logger)
        batch = next(iter(state.evaluators[0].dataloader.dataloader))
        with routing_state(state.model).recording() as records, torch.no_grad():
            state.model.eval()(batch)
        real = batch['attention_mask'].bool()
        assert not any(record.routed_BS[~real].any() for record in records), 'padding'
        shares.extend(record.routed_BS[real].float().mean().item() for record in records)

    monkeypatch.setattr(ThresholdCommit, 'after_load', recorded)
    trainer, logged = tune('gsm8k_itt_x2', 'max_duration=3ba')
    assert shares == pytest.approx([0.9, 0.9], abs=0.06)
    assert logged[ANSWERS][0] == pytest.approx(answer_loss(pretrained, data / 'test.jsonl'), abs=1e-5)
    assert logged[LOSS][0] == pytest.approx(answer_loss(pretrained, data / 'train.jsonl'), abs=1e-5)
    assert logged[LOSS][-1] < logged[LOSS][0] - 0.05
    model = trainer.state.model.model
    assert model.routing.calibrated_LT is None and model.model.layers[0].threshold_updates == 3
    assert model.model.layers[0].phi_TD[1].abs().max() > 1e-3, 'the step encodings train'


def test_the_first_thresholds_are_those_of_sequences_across_the_training_data():
    class Share(Dataset):
        num_samples = 10

        def __len__(self):
            return 40  # of an epoch

        def __getitem__(self, i):
            return range(10)[i]

    batches = list(_sequences_across(SimpleNamespace(dataset=Share(), collate_fn=list), 4))
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_changed_preprocessing_function_is_run(tune, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    losses = []
    for prompt in ('a', 'another'):
        (tmp_path / 'own_examples.py').write_text(
            f"def example(row):\n    return {{'prompt': '{prompt}', 'response': row['answer']}}\n"
        )
        monkeypatch.delitem(sys.modules, 'own_examples', raising=False)
        importlib.invalidate_caches()
        change = 'train_loader.dataset.preprocessing_fn=own_examples:example'
        losses += tune('gsm8k_dense', f'run_name={prompt}', change)[1][LOSS]
    assert losses[0] != losses[1]


def _tokenized(data, pretrained, cache):
    import datasets
    from composer.utils import dist
    from llmfoundry.data.finetuning.tasks import dataset_constructor
    from noted_examples import example

    datasets.config.HF_DATASETS_CACHE = cache
    dist.initialize_dist('cpu')
    files = {'data_files': {'train': str(data / 'train.jsonl')}}
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    with renew_examples():
        rows = dataset_constructor.build_from_hf(
            'json', 'train', max_seq_len=160, preprocessing_fn=example, tokenizer=tokenizer, hf_kwargs=files
        )
    return rows[0]['turns'][0]['input_ids']


def test_one_rank_tokenizes_for_all_at_every_start(data, pretrained, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    firsts = []
    for prompt in ('a', 'another'):
        calls = tmp_path / f'calls_{prompt}'
        (tmp_path / 'noted_examples.py').write_text(
            'import os\ndef example(row):\n'
            f"    with open({str(calls)!r}, 'a') as calls:\n        calls.write(os.environ['RANK'])\n"
            f"    return {{'prompt': {prompt!r}, 'response': row['answer']}}\n"
        )
        one, other = run_on_ranks(2, _tokenized, data, pretrained, tmp_path / 'cache')
        assert one == other and calls.read_text() == '0' * ROWS
        firsts.append(one)
    assert firsts[0] != firsts[1]


def test_a_dense_model_starts_as_the_pretrained_one(tune, pretrained, data):
    _, logged = tune('gsm8k_dense')
    dense = [answer_loss(pretrained, data / f'{split}.jsonl') for split in ('test', 'train')]
    assert [logged[ANSWERS][0], logged[LOSS][0]] == pytest.approx(dense, abs=1e-5)


def test_microbatches_and_the_side_of_the_padding_change_nothing(tune):
    """Answers have unequal lengths, so that a mean of means would be another loss and another gradient."""
    runs = [
        tune('gsm8k_itt_x2', f'run_name=run{i}', *overrides)
        for i, overrides in enumerate(
            [
                ['device_train_microbatch_size=1', *LINEAR],
                ['device_train_microbatch_size=4', 'tokenizer.kwargs.padding_side=left', *LINEAR],
            ]
        )
    ]
    trainer, logged = runs[0]
    for other, other_logged in runs[1:]:
        assert other_logged[LOSS] == pytest.approx(logged[LOSS], abs=1e-5)
        assert other_logged[ANSWERS][0] == pytest.approx(logged[ANSWERS][0], abs=1e-5)
        for name, value in weights(other).items():
            torch.testing.assert_close(value, weights(trainer)[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_run_goes_on_at_an_epoch_as_if_it_had_not_stopped(tune, tmp_path):
    given = ['global_train_batch_size=4', 'max_duration=2ep', 'save_num_checkpoints_to_keep=-1', 'eval_first=false']
    at_once, _ = tune('gsm8k_itt_x2', 'run_name=at_once', *given)
    runs = tmp_path / 'runs'
    (runs / 'stopped' / 'checkpoints').mkdir(parents=True)
    shutil.copy(runs / 'at_once' / 'manifest.json', runs / 'stopped')
    shutil.copy(runs / 'at_once' / 'checkpoints' / 'ep1-ba3-rank0.pt', runs / 'stopped' / 'checkpoints')
    other = write_pretrained(tmp_path / 'other', seed=1)
    with pytest.raises(SystemExit, match=r'trained with another .*model\.pretrained'):
        tune('gsm8k_itt_x2', 'run_name=stopped', *given, f'model.pretrained={other}')
    resumed, logged = tune('gsm8k_itt_x2', 'run_name=stopped', *given)
    assert len(logged[LOSS]) == 3, 'one of two epochs'
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(at_once)[name]), name


def test_two_fsdp_ranks_start_from_it_as_one_process_does(pretrained):
    options = {'pretrained': str(pretrained), 'thinking': 'itt', 'thinking_steps': 1, 'step_encoding_init': 0.0}
    config = json.loads((pretrained / 'config.json').read_text())
    shape = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
    options |= {key: config[key] for key in (*shape, 'num_key_value_heads', 'max_position_embeddings', 'rms_norm_eps')}
    expected = run_on_ranks(1, lambda: train(options, duration='2ba'))[0].losses
    runs = run_on_ranks(2, lambda: train(options, fsdp={'state_dict_type': 'full'}, microbatch=2, duration='2ba'))
    averaged = [sum(both) / 2 for both in zip(*(run.losses for run in runs), strict=True)]
    assert averaged == pytest.approx(expected, abs=2e-5) and expected[-1] < expected[0]


def test_learned_positions_count_from_the_first_token_of_a_text(tmp_path):
    ids = dict(vocab_size=257, bos_token_id=256, eos_token_id=256)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **ids)
    folder = write_pretrained(tmp_path, config=config)
    tokenizer, theirs = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer.pad_token = tokenizer.eos_token
    rows = [torch.arange(5), torch.arange(40, 60)]
    with torch.no_grad():
        losses = [theirs(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    expected = sum(losses).item() / sum(len(row) - 1 for row in rows)
    model = ComposerITTForCausalLM(tokenizer, str(folder), **shape_options(config, 'gpt2')).eval()
    for side in ('right', 'left'):
        tokenizer.padding_side = side
        batch = tokenizer.pad({'input_ids': [row.tolist() for row in rows]}, return_tensors='pt')
        # Neither padding nor a text's first token, which nothing predicts.
        labels = batch['input_ids'].masked_fill(batch['attention_mask'].cumsum(-1) * batch['attention_mask'] <= 1, -100)
        with torch.no_grad():
            loss = model({**batch, 'labels': labels}).loss.item()
        assert loss == pytest.approx(expected, abs=1e-5), side
