"""What the pictures measure, against written-out oracles."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from common import small_models
from scipy import stats
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from itt_composer.analysis.router_weights import RoutedTokens, histogram
from itt_composer.analysis.routing_records import token_thinking
from itt_composer.export.load import as_ours, as_routed
from research.figures import bootstrap, difficulty, easy_and_hard, logit_lens
from research.figures.aqua import Sample, answers_correctly, read_samples
from research.figures.bootstrap import difference_of_ratios, ratio_of_sums, spearman
from research.figures.documents import document_numbers
from research.figures.over_training import read_training

ITT = dict(thinking='itt', token_ratios=[0.7, 0.7, 0.7])


def rows(count=3, S=17, vocabulary=97, seed=3):
    return torch.randint(3, vocabulary, (count, S), generator=torch.Generator().manual_seed(seed))


def log_p_of_next(logits_BSV, ids_BS):
    return logits_BSV.log_softmax(-1)[:, :-1].gather(-1, ids_BS[:, 1:, None]).squeeze(-1)


# Which tokens think


@pytest.mark.parametrize('selection', ['threshold', 'top_k'])
def test_token_thinking_is_what_the_layers_record(selection):
    model, ids = small_models.build(**ITT), rows(5)
    model.set_thinking(selection=selection)
    thinking = token_thinking(model, ids, batch_size=2)
    assert thinking.layer_steps == [(layer, step) for layer in (0, 2) for step in (1, 2, 3)]
    with model.routing.recording() as recorded:
        model(ids)
    assert 0 < thinking.routed_MNS.mean() < 1
    for m, record in enumerate(recorded):
        assert_close(torch.tensor(thinking.gate_MNS[m]), record.gate_BS)
        assert torch.equal(torch.tensor(thinking.routed_MNS[m]), record.routed_BS)
    depth = sum(record.routed_BS.long() for record in recorded)
    assert torch.equal(torch.tensor(thinking.depth_NS), depth)


def test_recording_is_off_afterwards_also_after_an_error():
    model = small_models.build(**ITT)
    token_thinking(model, rows())
    with pytest.raises(ValueError, match='257 tokens'):
        token_thinking(model, rows(1, 257))
    assert model.routing.records is None


def test_a_removed_step_is_left_out_and_a_plain_model_is_refused():
    model = small_models.build(**ITT)
    model.set_thinking([0.7, 0, 0.7])
    assert token_thinking(model, rows()).layer_steps == [(0, 1), (0, 3), (2, 1), (2, 3)]
    with pytest.raises(ValueError, match='routes no tokens'):
        token_thinking(small_models.build(), rows())


def test_histogram_holds_every_token_once():
    gate_N = np.array([0.0, 0.1, 0.1, 0.5, 1.0])
    table = histogram({(2, 2): RoutedTokens(gate_N, gate_N > 0.2, 0.0)}, bins=10)
    assert table['routed'].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert table['not_routed'].tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 0]
    assert set(table['layer']) == {2} and set(table['step']) == {2}
    tanh = histogram({(0, 1): RoutedTokens(gate_N - 0.5, gate_N > 0.2, 0.0)})
    assert tanh['low'].min() == -1 and tanh[['routed', 'not_routed']].to_numpy().sum() == 5


# Logit lens


@pytest.mark.parametrize(
    'options',
    [{}, dict(thinking='loop', thinking_steps=2), dict(thinking='residual_scale'), ITT],
    ids=['plain', 'loop', 'residual_scale', 'itt'],
)
def test_the_lens_at_the_last_layer_is_the_model(options):
    model, ids = small_models.build(**options), rows()
    points = list(logit_lens.states(model, ids))
    last, x_BSD = points[-1]
    assert last.depth == last.layer + 1 == 4
    assert_close(logit_lens.log_probability(model, x_BSD, ids), log_p_of_next(model(ids).logits, ids))
    assert [point.depth for point, _ in points] == sorted(point.depth for point, _ in points)


def test_the_lens_reads_the_state_after_each_step():
    model, ids = small_models.build(**ITT), rows()
    points = {point[:2]: (point.depth, x_BSD) for point, x_BSD in logit_lens.states(model, ids)}
    assert list(points) == [(-1, 0), *((0, t) for t in range(4)), (1, 0), *((2, t) for t in range(4)), (3, 0)]
    assert [points[2, t][0] for t in range(4)] == [2.25, 2.5, 2.75, 3]
    # With the later steps removed, a layer's output is the state after the steps that are left.
    outputs = {}
    model.model.layers[0].register_forward_hook(lambda module, args, out: outputs.update(x=out[0]))
    for t, ratios in enumerate(([0, 0, 0], [0.7, 0, 0], [0.7, 0.7, 0], [0.7, 0.7, 0.7])):
        model.set_thinking(ratios)
        model(ids)
        assert_close(points[0, t][1], outputs['x'])


def test_the_lens_sees_a_block_as_one():
    model, ids = small_models.build(**small_models.MODELS['itt blocks refresh']), rows()
    points = [(point[:2], point.depth) for point, _ in logit_lens.states(model, ids)]
    steps = [((0, t), (t + 1) / 2) for t in range(4)], [((3, t), 3 + (t + 1) / 4) for t in range(4)]
    assert points == [((-1, 0), 0), *steps[0], ((2, 0), 3), *steps[1]]


def test_the_lens_of_a_plain_model_reads_what_hugging_face_hands_out():
    torch.manual_seed(0)
    shape = {key: value for key, value in small_models.SHAPE.items() if key != 'eos_token_id'}
    llama, ids = LlamaForCausalLM(LlamaConfig(**shape)).eval(), rows()
    hidden = llama(ids, output_hidden_states=True).hidden_states
    states = list(logit_lens.states(as_ours(llama, None), ids))
    for layer, (point, x_BSD) in enumerate(states[:-1]):
        assert point.layer == layer - 1
        assert_close(x_BSD, hidden[layer])


def test_the_lens_table_is_the_mean_over_tokens(few_documents):
    models = {'LLaMA': small_models.build(), 'ITT x4': small_models.build(**ITT)}
    ids = rows()
    table = logit_lens.measure(models, {'a': ids[:1], 'b': ids[1:]})
    for name, model in models.items():
        log_p = log_p_of_next(model(ids).logits, ids)
        last = table[(table['model'] == name) & (table['depth'] == 4)].iloc[0]
        assert last['log_probability'] == pytest.approx(log_p.mean().item(), rel=1e-5)
        assert last['probability'] == pytest.approx(log_p.exp().mean().item(), rel=1e-5)
        assert last['probability_low'] <= last['probability'] <= last['probability_high']
        embedded = model.model.embed_tokens(ids[:, :-1]).detach().double().numpy()
        first = table[(table['model'] == name) & (table['depth'] == 0)].iloc[0]
        assert first['rms'] == pytest.approx(np.sqrt((embedded**2).mean(-1)).mean(), rel=1e-5)


# Depth and difficulty


@pytest.fixture
def few_documents(monkeypatch):
    """Intervals from as few as two, as in what is small enough to be checked by hand."""
    monkeypatch.setattr(bootstrap, 'MIN_DOCUMENTS', 2)


def test_rank_correlation_is_scipys_and_its_interval_that_of_ranks_drawn_anew():
    generator = np.random.default_rng(0)
    shift_N = generator.normal(size=40)
    # Many ties, and documents whose tokens are alike.
    x_rows = [np.round(shift + generator.normal(size=30)) for shift in shift_N]
    y_rows = [0.5 * x_S + generator.normal(size=30) for x_S in x_rows]
    estimate = spearman(np.concatenate(x_rows), np.concatenate(y_rows), np.repeat(np.arange(40), 30))
    expected = stats.spearmanr(np.concatenate(x_rows), np.concatenate(y_rows)).statistic
    assert estimate.value == pytest.approx(expected, abs=1e-12)
    drawn = []
    for _ in range(1000):
        index = generator.integers(0, 40, 40)
        x_N, y_N = (np.concatenate([part[i] for i in index]) for part in (x_rows, y_rows))
        drawn.append(stats.spearmanr(x_N, y_N).statistic)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)


def test_rank_correlation_of_one_depth_alone_is_nan():
    assert np.isnan(spearman(np.ones(15), np.arange(15.0), np.repeat([0, 1, 2], 5))).all()


def test_means_over_tokens_of_documents_that_differ_in_length(few_documents):
    sums_N, counts_N = np.array([2.0, 9.0, 4.0]), np.array([1, 3, 2])
    estimate = ratio_of_sums(np.stack([sums_N, counts_N], axis=-1))
    assert estimate.value == 2.5 and estimate.low == pytest.approx(2) and estimate.high == pytest.approx(3)
    difference = difference_of_ratios(np.stack([sums_N, counts_N, counts_N, counts_N], axis=-1))
    assert difference.value == 1.5 and difference.low == pytest.approx(1)


def test_few_documents_have_no_interval():
    assert np.isnan(ratio_of_sums(np.ones((9, 2))).low) and ratio_of_sums(np.ones((10, 2))).low == 1


def test_documents_go_on_from_row_to_row():
    domains = {'a': torch.tensor([[9, 1, 5], [6, 7, 1], [8, 8, 8]]), 'b': torch.tensor([[1, 2, 1]])}
    numbers = document_numbers(domains, bos=1)
    assert numbers['a'].tolist() == [[0, 1, 1], [1, 1, 2], [2, 2, 2]] and numbers['b'].tolist() == [[3, 3, 4]]
    by_row = document_numbers(domains, bos=None)
    assert by_row['a'].tolist() == [[0] * 3, [1] * 3, [2] * 3] and by_row['b'].tolist() == [[3] * 3]


def test_the_interval_is_over_documents_and_not_over_their_rows(few_documents):
    """Copies of one document's row say nothing more of others; a domain of one document has no interval."""
    model, plain = small_models.build(**ITT), small_models.build(seed=1)
    ids = rows(6)
    ids[ids == 1] = 2
    ids[[0, 2, 4], 0] = 1  # Three documents of two rows.
    (three,), (two,) = ids.split(6), rows(2, seed=4).split(2)
    two[two == 1] = 2
    correlations, _ = difficulty.measure(model, plain, {'a': three, 'b': two})
    table = correlations.set_index(['domain', 'loss'])
    assert dict(table['documents'].xs('next', level='loss')) == {'a': 3, 'b': 1, 'all': 4}
    assert np.isnan(table['low']['b', 'next']) and not np.isnan(table['correlation']['b', 'next'])
    # Of three documents the resamples have ten sets, three of which are one document alone.
    loss_NS = -log_p_of_next(plain(three).logits, three).detach().numpy()
    chosen_NS = token_thinking(model, three).routed_MNS[0, :, :-1]
    only_a = difficulty.measure(model, plain, {'a': three})[1].iloc[0]
    alone = [
        loss_NS[i : i + 2][chosen_NS[i : i + 2]].mean() - loss_NS[i : i + 2][~chosen_NS[i : i + 2]].mean()
        for i in (0, 2, 4)
    ]
    assert (only_a['low'], only_a['high']) == pytest.approx((min(alone), max(alone)), abs=1e-5)


def test_depth_and_loss_by_hand():
    model, plain = small_models.build(**ITT), small_models.build(seed=1)
    domains = {'a': rows(4), 'b': rows(3, seed=4)}
    correlations, by_step = difficulty.measure(model, plain, domains)
    ids = torch.cat(list(domains.values()))
    loss_NS = -log_p_of_next(plain(ids).logits, ids).detach().numpy()
    thinking = token_thinking(model, ids)
    table = correlations.set_index(['domain', 'loss'])
    assert set(table.index) == {(domain, loss) for domain in ('a', 'b', 'all') for loss in ('next', 'own')}
    for loss, depth in (('next', thinking.depth_NS[:, :-1]), ('own', thinking.depth_NS[:, 1:])):
        expected = stats.spearmanr(depth.ravel(), loss_NS.ravel()).statistic
        assert table['correlation']['all', loss] == pytest.approx(expected, abs=1e-6)
        expected = stats.spearmanr(depth[:4].ravel(), loss_NS[:4].ravel()).statistic
        assert table['correlation']['a', loss] == pytest.approx(expected, abs=1e-6)
    assert table['tokens']['b', 'next'] == 3 * 16

    chosen = dict(zip(thinking.layer_steps, thinking.routed_MNS[:, :, :-1], strict=True))
    for _, row in by_step.iterrows():
        now = chosen[row['layer'], row['step']]
        assert row['fraction_routed'] == pytest.approx(now.mean())
        difference = loss_NS[now].mean() - loss_NS[~now].mean()
        assert row['difference'] == pytest.approx(difference, rel=1e-4, abs=1e-5)
        if row['step'] > 1:
            before = chosen[row['layer'], row['step'] - 1]
            assert row['fraction_routed_again'] == pytest.approx(now[before].mean())


# Easy and hard samples


def gpt2(layers=2):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=layers, n_head=2, n_positions=256)).eval()


@pytest.mark.parametrize('family', ['gpt2', 'itt'])
def test_nuclear_norm_is_that_of_a_gradient_computed_directly(family):
    model = gpt2() if family == 'gpt2' else small_models.build(**ITT, vocab_size=320)
    sample = Sample(prompt=[1, 5, 9, 4], options=[[i] for i in range(20, 25)], correct=2, solution=[7, 8, 30])
    for with_solution, predicted in ((False, 1), (True, 4)):
        norms = easy_and_hard.norms_of_sample(model, sample, with_solution)
        ids = torch.tensor([[1, 5, 9, 4, 22, 7, 8, 30]])
        log_p_S = log_p_of_next(model(ids).logits, ids)[0]
        loss = -log_p_S[3 : 3 + predicted].mean()
        if family == 'gpt2':
            (gradient,) = torch.autograd.grad(loss, [model.transformer.h[1].attn.c_attn.weight])
            gradient = gradient[:, 16:32]  # the keys
        else:
            (gradient,) = torch.autograd.grad(loss, [model.model.layers[1].self_attn.k_proj.weight])
        expected = torch.linalg.matrix_norm(gradient.double(), 'nuc').item()
        assert norms[1, 'k_proj'] == pytest.approx(expected, rel=1e-4) and expected > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_answer_is_the_likeliest_letter():
    model = gpt2()
    sample = Sample(prompt=[1, 5, 9, 4], options=[[i] for i in range(20, 25)], correct=0, solution=[])
    best = int(model(torch.tensor([sample.prompt])).logits[0, -1, 20:25].argmax())
    for correct in range(5):
        sample.correct = correct
        assert answers_correctly(model, sample) is (correct == best)
    # Letters of two tokens: the sum of both.
    pair = Sample(prompt=[1, 5], options=[[20, i] for i in range(30, 35)], correct=0, solution=[])
    scores = [log_p_of_next(model(ids).logits, ids)[0, 1:].sum().item() for ids in
              (torch.tensor([pair.prompt + option]) for option in pair.options)]  # fmt: skip
    pair.correct = int(np.argmax(scores))
    assert answers_correctly(model, pair)


@pytest.fixture(scope='module')
def tokenizer():
    """Bytes and a few merges, as GPT-2's."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(['Question: Options: A) B) C) D) E) Answer: A Explanation: it is'], 320)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token='<s>', eos_token='</s>')


def question(i):
    options = [f'{letter}){i * 10 + n}' for n, letter in enumerate('ABCDE')]
    return {'question': f'What is {i}?', 'options': options, 'rationale': f'it is {i}', 'correct': 'ABCDE'[i % 5]}


def write_questions(file, count):
    file.write_text(''.join(json.dumps(question(i)) + '\n' for i in range(count)))
    return file


def test_questions_become_samples(tmp_path, tokenizer):
    samples = read_samples(write_questions(tmp_path / 'q.jsonl', 7), 5, tokenizer, context=256)
    assert len(samples) == 5 and [sample.correct for sample in samples] == [0, 1, 2, 3, 4]
    text = tokenizer.decode(samples[3].tokens[0])
    assert text == 'Question: What is 3?\nOptions: A)30 B)31 C)32 D)33 E)34\nAnswer: D\nExplanation: it is 3'
    assert [tokenizer.decode(option) for option in samples[3].options] == [f' {letter}' for letter in 'ABCDE']
    letter, whole = samples[3].labels(False)[0], samples[3].labels(True)[0]
    assert tokenizer.decode(letter[letter >= 0]) == ' D'
    assert tokenizer.decode(whole[whole >= 0]) == ' D\nExplanation: it is 3'
    # A context that ends in the explanation cuts it; one that ends before drops the question.
    length = len(samples[0].prompt)
    cut = read_samples(tmp_path / 'q.jsonl', 1, tokenizer, context=length + 4)[0]
    assert cut.tokens.shape[1] <= length + 4 and cut.solution == samples[0].solution[: len(cut.solution)]
    assert read_samples(tmp_path / 'q.jsonl', 9, tokenizer, context=20) == []


def test_files_that_are_not_aqua_are_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r'aqua_dev.jsonl: no such file'):
        read_samples(tmp_path / 'aqua_dev.jsonl', 1, tokenizer, 256)
    (tmp_path / 'other.jsonl').write_text(json.dumps(question(0)) + '\n{"question": "?"}\n')
    with pytest.raises(ValueError, match=r'other.jsonl:2: not a question of AQuA \(KeyError'):
        read_samples(tmp_path / 'other.jsonl', 9, tokenizer, 256)


def test_easy_and_hard_table(tmp_path, tokenizer, monkeypatch, few_documents):
    write_questions(tmp_path / 'aqua_dev.jsonl', 6)
    write_questions(tmp_path / 'aqua_test.jsonl', 6)
    model = gpt2()
    before = [parameter.clone() for parameter in model.parameters()]
    right = iter([True, False, True, False, False, True])
    monkeypatch.setattr(easy_and_hard, 'answers_correctly', lambda model, sample: next(right))
    table = easy_and_hard.measure(model, tokenizer, tmp_path, train_samples=5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(table) == 2 * 2 * 2 * 4 and set(table['samples']) == {3}
    assert (
        (table['norm'] > 0).all() and (table['low'] <= table['norm']).all() and (table['norm'] <= table['high']).all()
    )
    # Untrained, so that the norms can be had from the model itself.
    right = iter([True, False, True, False, False, True])
    table = easy_and_hard.measure(model, tokenizer, tmp_path, train_samples=0)
    samples = read_samples(tmp_path / 'aqua_test.jsonl', 6, tokenizer, 256)
    norms = [easy_and_hard.norms_of_sample(model, samples[i], True)[1, 'v_proj'] for i in (0, 2, 5)]
    place = (table['target'] == 'letter and solution') & (table['group'] == 'easy') & (table['layer'] == 1)
    assert table[place & (table['projection'] == 'v_proj')]['norm'].item() == pytest.approx(np.mean(norms), rel=1e-5)
    easy_and_hard.plot(table).savefig(tmp_path / 'picture.png')
    monkeypatch.setattr(easy_and_hard, 'answers_correctly', lambda model, sample: False)
    with pytest.raises(ValueError, match='0 of 6 samples are easy'):
        easy_and_hard.measure(model, tokenizer, tmp_path, train_samples=0)


def test_training_on_the_samples_lowers_their_loss(tmp_path, tokenizer):
    samples = read_samples(write_questions(tmp_path / 'q.jsonl', 8), 8, tokenizer, 256)
    model = gpt2()

    def loss():
        with torch.no_grad():
            return np.mean([model(sample.tokens, labels=sample.labels(True)).loss.item() for sample in samples])

    before = loss()
    easy_and_hard.train(model, samples)
    assert loss() < before and not model.training


# Models and logs


def test_models_of_another_kind_are_named():
    shape = dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match=r'some/folder: .* is of the family gpt_neox; supported are llama, '):
        as_ours(GPTNeoXForCausalLM(GPTNeoXConfig(**shape)), 'some/folder')
    with pytest.raises(ValueError, match='some/folder: expected a model that routes tokens, got thinking: loop'):
        as_routed(small_models.build(thinking='loop', thinking_steps=2), 'some/folder')


def test_curves_of_a_run(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for batch in range(401):
            writer.add_scalar('router/layer2/step2/gate_q50', batch / 10, batch)
            writer.add_scalar('loss/train/total', 1.0, batch)
        writer.add_scalar('step_encoding/layer0/step0/mean', 1.0, 5)
    router = read_training(tmp_path, 'router')
    assert len(router) == 134 and router['batch'].iloc[1] == 3 and router['value'].iloc[1] == pytest.approx(0.3)
    assert set(router['layer']) == {2} and set(router['step']) == {2} and set(router['quantity']) == {'gate_q50'}
    assert read_training(tmp_path, 'step_encoding')['value'].tolist() == [1.0]
    with pytest.raises(ValueError, match='no TensorBoard files'):
        read_training(tmp_path / 'none', 'router')


def test_a_run_without_the_callback_is_named(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar('step_encoding/layer0/step0/mean', 1.0, 5)
    with pytest.raises(ValueError, match='no router/layer<n>/step<t> scalars; train with the callback router_weights'):
        read_training(tmp_path, 'router')
