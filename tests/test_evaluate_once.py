"""An evaluation on several ranks, whose sets do not divide among them, has the loss of one rank."""

import numpy as np
import pytest
import torch
from common.composer_runs import ITT, SHAPE
from common.ranks import run_on_ranks
from common.shards import write_data
from composer import Trainer
from composer.core import Evaluator
from composer.devices import DeviceCPU
from composer.loggers import InMemoryLogger
from composer.utils import dist
from llmfoundry.data.dataloader import build_dataloader
from transformers import AutoTokenizer

from itt_composer.callbacks.causal_gap import CausalGap
from itt_composer.training.composer_model import ComposerITTForCausalLM
from itt_composer.training.evaluate_once import EvaluateOnce, repeated


def evaluate(data, callbacks, options=SHAPE, name='metrics/cc/LanguageCrossEntropy'):
    dist.initialize_dist(DeviceCPU())
    loader = {
        **{'name': 'text', 'drop_last': False, 'num_workers': 0, 'prefetch_factor': None, 'persistent_workers': False},
        'dataset': {'local': str(data / 'validation' / 'cc'), 'max_seq_len': 32, 'shuffle': False},
    }
    dataloader = build_dataloader(loader, AutoTokenizer.from_pretrained(data / 'tokenizer'), 2)
    torch.manual_seed(0)
    model, memory = ComposerITTForCausalLM(**options), InMemoryLogger()
    evaluator = Evaluator(label='cc', dataloader=dataloader, metric_names=['LanguageCrossEntropy'])
    trainer = Trainer(model=model, eval_dataloader=evaluator, loggers=[memory], callbacks=callbacks, device='cpu')
    trainer.eval()
    return float(memory.data[name][-1][1])


def test_each_sequence_counts_once(tmp_path):
    data = write_data(tmp_path, {}, {'cc': 9})
    (one,) = run_on_ranks(1, evaluate, data, [])
    with_and_without = run_on_ranks(4, lambda: (evaluate(data, [EvaluateOnce()]), evaluate(data, [])))
    assert [loss for loss, _ in with_and_without] == pytest.approx([one] * 4, abs=1e-6)
    assert abs(with_and_without[0][1] - one) > 1e-5


def test_a_rank_without_a_sequence_takes_part_in_the_causal_gap(tmp_path):
    data = write_data(tmp_path, {}, {'cc': 1})
    name = 'causal_gap/cc/cross_entropy_top_k'
    (one,) = run_on_ranks(1, evaluate, data, [CausalGap()], ITT, name)
    two = run_on_ranks(2, evaluate, data, [CausalGap(), EvaluateOnce()], ITT, name, timeout=60)
    assert two == pytest.approx([one] * 2, abs=1e-6)


@pytest.mark.parametrize(('sequences', 'nodes', 'ranks'), [(145, 1, 8), (9, 1, 8), (3, 1, 8), (63, 2, 4), (7, 2, 2)])
def test_what_is_repeated(sequences, nodes, ranks):
    again = repeated('relaxed', sequences, nodes, nodes, ranks)
    per_rank = -(-sequences // (nodes * ranks))
    assert again.shape == (nodes, ranks, per_rank) and np.sum(~again) == sequences
