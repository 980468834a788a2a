"""Converted shards through foundry's own text loader."""

import json
from collections import Counter

import pytest
from transformers import AutoTokenizer

from data_prep.conversion import convert
from data_prep.domains import PROPORTIONS


def test_foundry_streams_the_domains_in_the_proportions_of_the_recipe(tmp_path):
    from llmfoundry.data.text_data import build_text_dataloader

    # The domains' texts have different words, so that a row tells where it comes from.
    word_of = dict(zip(PROPORTIONS, ('ant', 'bee', 'cat', 'dog', 'elk', 'fox', 'gnu'), strict=True))
    for domain, word in word_of.items():
        (tmp_path / 'in' / domain).mkdir(parents=True)
        lines = [json.dumps({'text': f'{word} {n} ' * 30}) + '\n' for n in range(60)]
        (tmp_path / 'in' / domain / 'a.jsonl').write_text(''.join(lines))
    out = tmp_path / 'out'
    manifest = convert(tmp_path / 'in', out, seq_len=32, validation_tokens=3000, workers=1)
    tokenizer = AutoTokenizer.from_pretrained(out / 'tokenizer')
    streams = {
        name: {'local': str(out / 'train' / name), 'split': None, 'proportion': domain['proportion']}
        for name, domain in manifest['domains'].items()
    }
    spec = build_text_dataloader(
        tokenizer,
        device_batch_size=20,
        dataset={'streams': streams, 'max_seq_len': 32, 'shuffle': True, 'epoch_size': 2000},
        drop_last=True,
        num_workers=0,
        pin_memory=False,
        prefetch_factor=None,
        persistent_workers=False,
    )
    rows = [row for batch in spec.dataloader for row in batch['input_ids']]
    assert len(rows) == 2000
    assert {tuple(row.shape) for row in rows} == {(32,)}
    found = Counter()
    for text in tokenizer.batch_decode(rows):
        found.update(name for name, word in word_of.items() if word in text)
    assert sum(found.values()) == 2000
    assert {name: count / 2000 for name, count in found.items()} == pytest.approx(PROPORTIONS, abs=0.001)
