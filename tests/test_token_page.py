"""The page of tokens shaded by depth, ``make see``."""

from __future__ import annotations

import html.parser

import numpy as np
import pytest
import torch
from common import small_models
from common.token_rows import ITT, byte_level_tokenizer

from itt_composer.analysis.page_style import SCHEMES, contrast, shades
from itt_composer.analysis.routing_records import token_thinking
from itt_composer.analysis.token_page import UNFINISHED, Passage, token_page, token_pieces
from itt_composer.evaluation import tokens
from research.figures.measurements import paragraph, read_table, write_table

HOSTILE = 'a <u>bold</u> & "quoted" \'x\' </span><script>alert(1)</script>\n\ttabs, naïve 日本 🎉 end'


@pytest.fixture(scope='module')
def tokenizer():
    return byte_level_tokenizer()


class Page(html.parser.HTMLParser):
    """Tags, the text of the running text's spans, and the cells of the rows."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.tokens, self.rows, self.titles, self.text = [], [], {}, [], ''
        self._open, self._row = None, None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self._open = tag
        if tag == 'span' and 'title' in attributes:
            self.tokens.append('')
            self.titles.append(attributes['title'])
            self._open = 'token'
        elif tag == 'tr':
            self._row = None
        elif tag == 'td' and self._row and 'title' in attributes:
            self.rows.setdefault(self._row, []).append(attributes.get('class') == 'y')

    def handle_data(self, data):
        self.text += data
        if self._open == 'token':
            self.tokens[-1] += data
        elif self._open == 'th':
            self._row = data

    def handle_endtag(self, tag):
        self._open = None


@pytest.fixture
def passage(tokenizer):
    model = small_models.build(**ITT, vocab_size=320)
    return tokens.passage_of_ids(model, tokenizer, 'a <title>', tokenizer(HOSTILE)['input_ids'])


def test_pieces_are_the_text_and_a_characters_last_byte_shows_it(tokenizer):
    ids = tokenizer(HOSTILE)['input_ids']
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert ''.join(piece for piece in pieces if piece != UNFINISHED) == HOSTILE
    assert pieces[pieces.index('日') - 2 : pieces.index('日')] == [UNFINISHED] * 2


def test_nothing_in_a_text_becomes_markup(passage):
    page = Page(token_page([passage], 'threshold', 'about <i>this</i> model'))
    assert not {'u', 'script', 'i'} & set(page.tags)
    shown = ''.join(page.tokens).replace('⏎', '').replace('⇥', '').replace(UNFINISHED, '')
    assert shown == HOSTILE
    assert '<script>' not in token_page([passage], 'threshold', '')


def test_cells_depths_and_weights_are_the_routers(passage, tokenizer):
    ids = tokenizer(HOSTILE)['input_ids']
    thinking = token_thinking(small_models.build(**ITT, vocab_size=320), torch.tensor([ids]))
    page = Page(token_page([passage], 'threshold', ''))
    for m, (layer, step) in enumerate(thinking.layer_steps):
        assert page.rows[f'layer{layer}/step{step}'] == thinking.routed_MNS[m, 0].tolist()
    for i, title in enumerate(page.titles):
        assert f': {thinking.depth_NS[0, i]} of 6 extra steps\n' in title
        gate, routed = thinking.gate_MNS[4, 0, i], thinking.routed_MNS[4, 0, i]
        assert f'layer2/step2: {gate:.3f}{" ●" if routed else ""}\n' in title


@pytest.mark.parametrize(
    'rule, says', [('threshold', 'Threshold routing (causal)'), ('top_k', 'later tokens change'), ('top_p', 'Top-p')]
)
def test_the_page_says_which_rule_chose(passage, rule, says):
    assert says in Page(token_page([passage], rule, '')).text


def test_a_text_longer_than_the_context_is_read_in_parts(tokenizer):
    model = small_models.build(**ITT, vocab_size=320)
    ids = tokenizer(HOSTILE * 8)['input_ids']
    assert 256 < len(ids) < 512 + 256
    passage = tokens.passage_of_ids(model, tokenizer, 't', ids)
    assert passage.starts == set(range(256, len(ids), 256))
    again = token_thinking(model, torch.tensor([ids[256:512]]))
    assert np.array_equal(passage.routed_MS[:, 256:512], again.routed_MNS[:, 0])
    page = Page(token_page([passage], 'threshold', ''))
    assert 'longer than the context of the model' in page.text and page.tags.count('hr') == len(passage.starts)
    assert len(page.rows['layer2/step2']) == len(page.tokens) == len(ids)


def test_a_passage_survives_its_table(passage, tmp_path):
    passage.starts = {5}
    write_table(passage.table(), tmp_path / 'table.csv')
    again = Passage.from_table(read_table(tmp_path / 'table.csv'))
    assert (again.title, again.pieces, again.layer_steps, again.starts) == (
        passage.title, passage.pieces, passage.layer_steps, {5},
    )  # fmt: skip
    assert np.array_equal(again.routed_MS, passage.routed_MS)
    np.testing.assert_allclose(again.gate_MS, passage.gate_MS, rtol=1e-5)


@pytest.mark.parametrize('scheme', list(SCHEMES))
def test_every_shade_can_be_read_and_is_told_from_the_next(scheme):
    levels = shades(SCHEMES[scheme])
    assert all(contrast(back, ink) >= 4.5 for back, ink in levels)
    to_paper = [contrast(back, SCHEMES[scheme]['paper']) for back, _ in levels]
    assert to_paper == sorted(to_paper) and to_paper[-1] > 4.5
    assert contrast(SCHEMES[scheme]['faint'], SCHEMES[scheme]['paper']) >= 4.5
    assert contrast('#ffffff', '#000000') == pytest.approx(21)


def test_text_from_a_file_or_as_it_is(tmp_path):
    (tmp_path / 'a.txt').write_text('from a file')
    (tmp_path / 'b.txt').write_bytes(b'\xff\xfe')
    assert tokens.read_text(str(tmp_path / 'a.txt')) == ('a.txt', 'from a file')
    assert tokens.read_text('some text. With/a slash') == ('some text. With/a slash', 'some text. With/a slash')
    assert tokens.read_text('word')[1] == 'word'
    paragraph_of_text = 'All work and no play makes Jack a dull boy. ' * 7  # Longer than a file's name may be.
    assert tokens.read_text(paragraph_of_text)[1] == paragraph_of_text
    for text, message in (
        (str(tmp_path / 'c.txt'), 'c.txt: no such file'),
        (str(tmp_path / 'b.txt'), 'not a text in UTF-8'),
        ('  ', 'no text in it'),
    ):
        with pytest.raises(ValueError, match=message):
            tokens.read_text(text)


def test_the_first_document_long_enough_is_the_paragraph():
    rows = torch.tensor([[9, 8, 1, 7, 6, 1, 5, 4], [1, 2, 3, 4, 5, 6, 7, 8]])
    assert paragraph(rows, 1, 3) == [1, 7, 6]
    assert paragraph(rows, 1, 6) == [1, 2, 3, 4, 5, 6]
    assert paragraph(rows, None, 4) == [9, 8, 1, 7]
