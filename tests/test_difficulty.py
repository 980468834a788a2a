"""Depth against loss, and intervals over documents, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from common import small_models
from common.token_rows import ITT, log_p_of_next, rows
from scipy import stats

from itt_composer.analysis.routing_records import token_thinking
from research.figures import difficulty
from research.figures.bootstrap import difference_of_ratios, ratio_of_sums, spearman
from research.figures.documents import document_numbers


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
    model, dense = small_models.build(**ITT), small_models.build(seed=1)
    ids = rows(6)
    ids[ids == 1] = 2
    ids[[0, 2, 4], 0] = 1  # Three documents of two rows.
    (three,), (two,) = ids.split(6), rows(2, seed=4).split(2)
    two[two == 1] = 2
    correlations, _ = difficulty.measure(model, dense, {'a': three, 'b': two})
    table = correlations.set_index(['domain', 'loss'])
    assert dict(table['documents'].xs('next', level='loss')) == {'a': 3, 'b': 1, 'all': 4}
    assert np.isnan(table['low']['b', 'next']) and not np.isnan(table['correlation']['b', 'next'])
    # Of three documents the resamples have ten sets, three of which are one document alone.
    loss_NS = -log_p_of_next(dense(three).logits, three).detach().numpy()
    chosen_NS = token_thinking(model, three).routed_MNS[0, :, :-1]
    only_a = difficulty.measure(model, dense, {'a': three})[1].iloc[0]
    alone = [
        loss_NS[i : i + 2][chosen_NS[i : i + 2]].mean() - loss_NS[i : i + 2][~chosen_NS[i : i + 2]].mean()
        for i in (0, 2, 4)
    ]
    assert (only_a['low'], only_a['high']) == pytest.approx((min(alone), max(alone)), abs=1e-5)


def test_depth_and_loss_by_hand():
    model, dense = small_models.build(**ITT), small_models.build(seed=1)
    domains = {'a': rows(4), 'b': rows(3, seed=4)}
    correlations, by_step = difficulty.measure(model, dense, domains)
    ids = torch.cat(list(domains.values()))
    loss_NS = -log_p_of_next(dense(ids).logits, ids).detach().numpy()
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
