"""Calibration: the share really chosen is the ratio asked for, on text that the thresholds were not set from."""

import itertools
import json

import pytest
import torch
from common import shards, small_models

from itt_composer.evaluation import calibrate as calibration
from itt_composer.evaluation.calibrate import calibrate, routed_fractions, threshold_above
from itt_composer.evaluation.held_out import held_out_rows
from itt_composer.model import ITTConfig, ITTForCausalLM

CONFIG = ITTConfig(vocab_size=97)


@pytest.fixture(scope='module')
def real_rows(shared):
    """Rows of 256 tokens of the RedPajama sample in LLaMA's vocabulary, half to calibrate with and half held out."""
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(str(shared / 'data/llama_tokenizer/tokenizer.model'))
    rows = []
    for file in sorted((shared / 'data/redpajama_sample').glob('*/*.jsonl')):
        with open(file) as lines:
            text = '\n'.join(json.loads(line)['text'][:6000] for line in itertools.islice(lines, 12))
        ids = tokenizer.encode(text)
        rows += [ids[i : i + 256] for i in range(0, len(ids) - 255, 256)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    return torch.tensor(rows)[order[:100]].tensor_split(2)


def model_of_real_tokens() -> ITTForCausalLM:
    torch.manual_seed(0)
    model = ITTForCausalLM(
        ITTConfig(
            **{**small_models.SHAPE, 'vocab_size': 32000, 'hidden_size': 64, 'num_key_value_heads': 4},
            thinking='itt',
            embedding_initializer_range=0.5,
            router_initializer_range=0.3,
        )
    )
    return model.eval()


def test_share_on_held_out_real_text_is_the_ratio(real_rows):
    model, (to_set, held_out) = model_of_real_tokens(), real_rows
    assert len(held_out) == 50
    for ratio in (0.1, 0.9):
        ratios = [ratio, 1 - ratio, 0.5]
        calibrate(model, to_set, ratios)
        model.set_thinking(ratios)
        for (_, step), share in routed_fractions(model, held_out).items():
            assert share == pytest.approx(ratios[step - 1], abs=0.02), (ratios, step)


@pytest.mark.parametrize(('position', 'kv'), [('rotary', 'refresh'), ('rotary', 'shared'), ('learned', 'routed_only')])
@torch.no_grad()
def test_one_pass_sets_every_threshold_for_what_the_earlier_steps_do(position, kv):
    """On the rows themselves every step chooses its share exactly, in whatever pieces the rows are computed."""
    model = small_models.build(thinking='itt', position=position, thinking_kv=kv)
    rows = torch.randint(97, (10, 50), generator=torch.Generator().manual_seed(8))
    before = model(rows).logits
    thresholds = calibrate(model, rows, [0.9, 0.3, 0.6], batch_size=3)
    assert torch.equal(model(rows).logits, before)
    model.set_thinking([0.9, 0.3, 0.6])
    fractions = routed_fractions(model, rows, batch_size=4)
    assert len(fractions) == 2 * 3
    assert fractions == pytest.approx({(layer, step): {1: 0.9, 2: 0.3, 3: 0.6}[step] for layer, step in fractions})
    for one, other in zip(thresholds, calibrate(model, rows, [0.9, 0.3, 0.6], batch_size=10), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_extreme_shares_and_removed_steps():
    model = small_models.build(thinking='itt')
    rows = torch.randint(97, (4, 30), generator=torch.Generator().manual_seed(8))
    calibrate(model, rows, [1.0, 0.0, 0.4])
    model.set_thinking([1.0, 0.0, 0.4])
    fresh = torch.randint(97, (4, 30), generator=torch.Generator().manual_seed(9))
    shares = routed_fractions(model, fresh)
    assert {step for _, step in shares} == {1, 3}
    assert [share for (_, step), share in shares.items() if step == 1] == [1, 1]
    assert json.loads(json.dumps(model.config.calibrated_thresholds)) == model.config.calibrated_thresholds
    assert threshold_above(torch.tensor([3.0, 1.0, 2.0, 4.0]), 0.5) == 2.5
    assert threshold_above(torch.tensor([3.0, 1.0, 2.0, 4.0]), 0.01) == 3.5


def test_command_writes_what_set_thinking_finds(tmp_path, capsys):
    data = shards.write_data(tmp_path / 'data', {}, {'a': 12, 'b': 3}, row_length=32)
    model = small_models.build(thinking='itt')
    model.save_pretrained(tmp_path / 'model')
    calibration.main(tmp_path / 'model', data, ['0.7/0.7/0.9', '0.2/0/0.5'], sequences=14, batch_size=4)
    printed = capsys.readouterr().out
    assert 'from 7 sequences, checked on 7 others of 32 tokens' in printed
    again = ITTForCausalLM.from_pretrained(tmp_path / 'model')
    rows = held_out_rows(data, 14, CONFIG)
    for ratios in ([0.7, 0.7, 0.9], [0.2, 0, 0.5]):
        again.set_thinking(ratios)
        for (_, step), share in routed_fractions(again, rows).items():
            assert share == pytest.approx(ratios[step - 1], abs=0.15)
    assert all(again.routing.calibrated_LT.values())


def test_rows_come_from_the_domains_in_turn(tmp_path):
    data = shards.write_data(tmp_path, {}, {'a': 5, 'b': 2}, row_length=16)
    rows = held_out_rows(data, 7, CONFIG)
    alone = {name: shards.write_data(tmp_path / name, {}, {name: n}, 16) for name, n in (('a', 5),)}
    assert torch.equal(rows[[0, 2, 4, 5, 6]], held_out_rows(alone['a'], 5, CONFIG))


def test_without_a_count_64_rows_are_used(tmp_path, recwarn):
    data = shards.write_data(tmp_path, {}, {'a': 66}, row_length=16)
    assert torch.equal(held_out_rows(data, None, CONFIG), held_out_rows(data, 64, CONFIG))
    assert not [one for one in recwarn if 'sequences' in str(one.message)]


def test_without_a_count_fewer_rows_are_all_used_with_a_warning(tmp_path, capsys):
    data = shards.write_data(tmp_path / 'data', {}, {'a': 7}, row_length=16)
    small_models.build(thinking='itt').save_pretrained(tmp_path / 'model')
    with pytest.warns(UserWarning, match=f'^sequences: {data / "validation"} has 7, not 64; all are used$'):
        calibration.main(tmp_path / 'model', data, ['0.7/0.7/0.9'])
    assert 'from 4 sequences, checked on 3 others' in capsys.readouterr().out
    one = shards.write_data(tmp_path / 'one', {}, {'a': 1}, row_length=16)
    with pytest.raises(SystemExit, match='expected at least 2 sequences, got 1'):
        calibration.main(tmp_path / 'model', one, ['0.7/0.7/0.9'])


def test_rows_longer_than_the_model_has_positions_are_cut_as_in_training(tmp_path):
    data = shards.write_data(tmp_path, {}, {'a': 3}, row_length=16)
    cut = held_out_rows(data, 3, ITTConfig(vocab_size=97, max_position_embeddings=10))
    assert torch.equal(cut, held_out_rows(data, 3, CONFIG)[:, :10])


def test_bad_input_is_named(tmp_path):
    data = shards.write_data(tmp_path / 'data', {}, {'a': 3}, row_length=16)
    for call, message in (
        (lambda: held_out_rows(data, 4, CONFIG), 'sequences: expected at most 3, .*, got 4'),
        (
            lambda: held_out_rows(data, 3, ITTConfig(vocab_size=20)),
            'expected token ids below 20, the vocabulary of the model',
        ),
        (lambda: held_out_rows(tmp_path, 3, CONFIG), 'no validation shards in it; make them: itt data --out'),
        (lambda: calibrate(small_models.build(), torch.zeros(1, 4), [0.5]), 'routes no tokens'),
        (lambda: calibrate(small_models.build(thinking='itt'), torch.zeros(1, 4), [0.5]), '1 ratios for 3'),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    small_models.build().save_pretrained(tmp_path / 'plain')
    for folder, ratios, message in (
        (tmp_path / 'nowhere', '0.5', 'no exported model in'),
        (tmp_path / 'plain', '0.5', 'expected a model that routes tokens'),
        (tmp_path / 'plain', 'half', "'half' is not numbers between slashes"),
    ):
        with pytest.raises(SystemExit, match=message):
            calibration.main(folder, data, [ratios])
