"""Which tokens of a text take which steps, as a self-contained HTML page (Figure 7, left).

S tokens, M pairs of a layer and a step.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from itt_composer.analysis.routing_records import TokenThinking
from itt_composer.analysis.token_page_style import LEVELS, style
from itt_composer.options import SELECTION

LINE_CHARACTERS = 108
"""About as wide as a line of the layer-by-layer part gets, in characters."""
UNFINISHED = '·'
"""Stands for a token that holds only some of a character's bytes; the last of them shows the character."""
NEWLINE, TAB = '⏎', '⇥'

RULES = {
    'threshold': '<b>Causal rule</b> (<code>selection: threshold</code>): a token takes a step when its own score '
    'exceeds the threshold of that step, so no later token has a say.',
    'top_k': '<b>Top-k rule</b> (<code>selection: top_k</code>), usually that of the training: the highest scores of '
    'the whole text are chosen, so <b>later tokens have a say</b> in whether an earlier one thinks.',
    'top_p': '<b>Top-p rule</b> (<code>selection: top_p</code>): the highest scores of the whole text are chosen, so '
    '<b>later tokens have a say</b> in whether an earlier one thinks.',
}
assert set(RULES) == set(SELECTION)


@dataclass
class Passage:
    """A text in tokens, and what the routers did with them."""

    title: str
    pieces: list[str]
    """What each token shows; together the text."""
    layer_steps: list[str]
    """The M steps by their name in Figure 7: 3-2 is step 2 of layer 3."""
    weight_MS: np.ndarray
    """The router's weight, whether or not the token took the step."""
    chosen_MS: np.ndarray
    """Whether the token took the step."""
    starts: set[int]
    """Where the model began anew, because the text is longer than its context; without 0."""

    @classmethod
    def of(cls, title: str, pieces: list[str], windows: Sequence[TokenThinking]) -> Passage:
        """The passage that was read in ``windows`` of one row each, one after another."""
        ends = np.cumsum([window.depth_NS.shape[1] for window in windows])
        return cls(
            title,
            pieces,
            [f'{layer}-{step}' for layer, step in windows[0].layer_steps],
            np.concatenate([window.weight_MNS[:, 0] for window in windows], axis=1),
            np.concatenate([window.chosen_MNS[:, 0] for window in windows], axis=1),
            set(ends[:-1].tolist()),
        )

    def table(self) -> pd.DataFrame:
        """A row for each token: ``title``, ``piece`` (as JSON), ``start``, and each step's weight and choice."""
        columns: dict[str, Any] = {
            'title': self.title,
            'piece': [json.dumps(piece) for piece in self.pieces],
            'start': [int(i in self.starts) for i in range(len(self.pieces))],
        }
        for m, name in enumerate(self.layer_steps):
            columns |= {f'weight {name}': self.weight_MS[m], f'chosen {name}': self.chosen_MS[m].astype(int)}
        return pd.DataFrame(columns)

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> Passage:
        """The inverse of :meth:`table`."""
        names = [column.removeprefix('weight ') for column in table.columns if column.startswith('weight ')]
        weight_MS, chosen_MS = (
            table[[f'{kind} {name}' for name in names]].to_numpy().T for kind in ('weight', 'chosen')
        )
        starts = {i for i, start in enumerate(table['start']) if start}
        pieces = [json.loads(piece) for piece in table['piece']]
        return cls(str(table['title'].iloc[0]), pieces, names, weight_MS, chosen_MS.astype(bool), starts)

    @property
    def depth_S(self) -> np.ndarray:
        """How many of the M steps each token took."""
        return self.chosen_MS.sum(0)


def token_pieces(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; ``UNFINISHED`` where that is not yet a whole character."""
    stream = DecodeStream(skip_special_tokens=False)
    pieces = [stream.step(tokenizer.backend_tokenizer, int(i)) for i in ids]
    return [UNFINISHED if piece is None else piece for piece in pieces]


def token_page(passages: Sequence[Passage], rule: str, about: str) -> str:
    """The page.

    Args:
        passages: the texts, all of one model.
        rule: the selection rule that chose the tokens, which the page states.
        about: which model this is, in words.
    """
    names = passages[0].layer_steps
    layer, step = names[-1].split('-')
    most = max(1, max(int(passage.depth_S.max()) for passage in passages))
    parts = [
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>{html.escape(passages[0].title)}: inner thinking</title>',
        f'<style>{style()}</style>',
        '<h1>Which tokens think</h1>',
        f'<p>{html.escape(about)}</p><p>{RULES[rule]}</p>',
        '<p>The darker a token (on a dark screen: the brighter), the more extra steps it takes, over all layers that '
        f"think; point at one for the routers' weights. In the rows layer by layer, “{names[-1]}” is step {step} of "
        f'layer {layer}, and a filled cell (●) is a token that takes the step.</p>',
        _key(most, len(names)),
    ]
    for passage in passages:
        parts += _passage(passage, most)
    return '\n'.join([*parts, '</html>\n'])


def _key(most: int, steps: int) -> str:
    cells = ''.join(f'<span class="d{_level(depth, most)}">{depth}</span>' for depth in range(most + 1))
    return f'<p class="key">Extra steps: {cells} <span class="note">of {steps}</span></p>'


def _level(depth: int, most: int) -> int:
    return round(LEVELS * depth / most)


def _passage(passage: Passage, most: int) -> Iterator[str]:
    levels = [_level(int(depth), most) for depth in passage.depth_S]
    hovers = [_hover(passage, i) for i in range(len(levels))]
    yield f'<h2>{html.escape(passage.title)}</h2>'
    if passage.starts:
        yield (
            '<p class="note">The text is longer than the model\'s context; it is read in '
            f'{len(passage.starts) + 1} parts, each from its own beginning, with a dashed line between them.</p>'
        )
    tokens = (
        ('<hr>' if i in passage.starts else '')
        + f'<span class="d{levels[i]}" title="{hovers[i]}">{_inline(piece)}</span>'
        for i, piece in enumerate(passage.pieces)
    )
    yield f'<div class="text">{"".join(tokens)}</div>'
    yield _shares(passage)
    yield '<h3>Layer by layer</h3>'
    for first, end in _lines(passage.pieces, passage.starts):
        head = ''.join(
            f'<td class="d{levels[i]}">{html.escape(_plain(passage.pieces[i]))}</td>' for i in range(first, end)
        )
        rows = [f'<tr><th></th>{head}</tr>']
        for name, chosen_S in zip(passage.layer_steps, passage.chosen_MS, strict=True):
            cells = ''.join(
                f'<td{" class=y" if chosen_S[i] else ""} title="{hovers[i]}">{"●" if chosen_S[i] else ""}</td>'
                for i in range(first, end)
            )
            rows.append(f'<tr><th>{name}</th>{cells}</tr>')
        counts = ''.join(f'<td>{passage.depth_S[i]}</td>' for i in range(first, end))
        rows.append(f'<tr class="count"><th>steps</th>{counts}</tr>')
        yield f'<table class="steps">{"".join(rows)}</table>'


def _shares(passage: Passage) -> str:
    head = ''.join(f'<th>{name}</th>' for name in passage.layer_steps)
    chosen = ''.join(f'<td>{share:.0%}</td>' for share in passage.chosen_MS.mean(1))
    weight = ''.join(f'<td>{mean:.2g}</td>' for mean in passage.weight_MS.mean(1))
    return (
        f'<table class="shares"><tr><th>layer-step</th>{head}</tr><tr><th>tokens chosen</th>{chosen}</tr>'
        f'<tr><th>mean weight</th>{weight}</tr></table>'
    )


def _hover(passage: Passage, i: int) -> str:
    steps = zip(passage.layer_steps, passage.weight_MS[:, i], passage.chosen_MS[:, i], strict=True)
    lines = [f'“{passage.pieces[i]}” takes {passage.depth_S[i]} of {len(passage.layer_steps)} steps']
    lines += [f'{name}: {weight:.3f}{" ●" if chosen else ""}' for name, weight, chosen in steps]
    return html.escape('\n'.join(lines)).replace('\n', '&#10;')


def _inline(piece: str) -> str:
    """The token in the running text, where a line break is seen and also breaks the line."""
    return html.escape(piece).replace('\n', f'{NEWLINE}\n').replace('\t', f'{TAB}\t')


def _plain(piece: str) -> str:
    """The token in a cell of its own."""
    return piece.replace('\n', NEWLINE).replace('\t', TAB)


def _lines(pieces: Sequence[str], starts: set[int]) -> Iterator[tuple[int, int]]:
    """First and end of the tokens of each line: as many as fit, none over the border between two windows."""
    first, width = 0, 0
    for i, piece in enumerate(pieces):
        needed = max(2, len(_plain(piece))) + 1
        if i > first and (width + needed > LINE_CHARACTERS or i in starts):
            yield first, i
            first, width = i, 0
        width += needed
    if first < len(pieces):
        yield first, len(pieces)
