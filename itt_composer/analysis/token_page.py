"""The steps that each token of a text is routed to, as a self-contained HTML page (Figure 7, left).

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
from markupsafe import Markup
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from itt_composer.analysis.html_page import page
from itt_composer.analysis.page_style import LEVELS
from itt_composer.analysis.routing_records import TokenThinking
from itt_composer.options import SELECTION

LINE_CHARACTERS = 108
"""About as wide as a line of the layer-by-layer part gets, in characters."""
UNFINISHED = '·'
"""Stands for a token that holds only some of a character's bytes; the last of them shows the character."""
NEWLINE, TAB = '⏎', '⇥'

RULES = {
    'threshold': '<b>Threshold routing (causal)</b>: a token is routed to a step when its own score exceeds the '
    'threshold of that step. No later token changes that.',
    'top_k': '<b>Top-k routing (non-causal)</b>: the tokens with the k highest scores of the complete text are routed, '
    'so <b>later tokens change</b> whether an earlier one is routed.',
    'top_p': '<b>Top-p routing (non-causal)</b>: the tokens with the highest scores of the complete text are routed, '
    'so <b>later tokens change</b> whether an earlier one is routed.',
}
assert set(RULES) == set(SELECTION)


@dataclass
class Passage:
    """A text in tokens, and what the routers did with them."""

    title: str
    pieces: list[str]
    """What each token shows; together the text."""
    layer_steps: list[str]
    """The M steps by name: layer2/step2 is step 2 of layer 2, counted from 0 (3-2 in Figure 7)."""
    gate_MS: np.ndarray
    """Gate value of each token, routed or not."""
    routed_MS: np.ndarray
    """Whether the token was routed to the step."""
    starts: set[int]
    """Where a new part begins, because the text is longer than the model's context; without 0."""

    @classmethod
    def of(cls, title: str, pieces: list[str], windows: Sequence[TokenThinking]) -> Passage:
        """Return the passage that was read in consecutive ``windows`` of one sequence each."""
        ends = np.cumsum([window.depth_NS.shape[1] for window in windows])
        return cls(
            title,
            pieces,
            [f'layer{layer}/step{step}' for layer, step in windows[0].layer_steps],
            np.concatenate([window.gate_MNS[:, 0] for window in windows], axis=1),
            np.concatenate([window.routed_MNS[:, 0] for window in windows], axis=1),
            set(ends[:-1].tolist()),
        )

    def table(self) -> pd.DataFrame:
        """Return a row for each token: ``title``, ``piece`` (JSON), ``start``, ``gate`` and ``routed`` of each step."""
        columns: dict[str, Any] = {
            'title': self.title,
            'piece': [json.dumps(piece) for piece in self.pieces],
            'start': [int(i in self.starts) for i in range(len(self.pieces))],
        }
        for m, name in enumerate(self.layer_steps):
            columns |= {f'gate {name}': self.gate_MS[m], f'routed {name}': self.routed_MS[m].astype(int)}
        return pd.DataFrame(columns)

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> Passage:
        """The inverse of :meth:`table`."""
        names = [column.removeprefix('gate ') for column in table.columns if column.startswith('gate ')]
        gate_MS, routed_MS = (table[[f'{kind} {name}' for name in names]].to_numpy().T for kind in ('gate', 'routed'))
        starts = {i for i, start in enumerate(table['start']) if start}
        pieces = [json.loads(piece) for piece in table['piece']]
        return cls(str(table['title'].iloc[0]), pieces, names, gate_MS, routed_MS.astype(bool), starts)

    @property
    def depth_S(self) -> np.ndarray:
        """Number of the M steps that each token was routed to."""
        return self.routed_MS.sum(0)


def token_pieces(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text; ``UNFINISHED`` where that is not yet a complete character."""
    stream = DecodeStream(skip_special_tokens=False)
    pieces = [stream.step(tokenizer.backend_tokenizer, int(i)) for i in ids]
    return [UNFINISHED if piece is None else piece for piece in pieces]


def token_page(passages: Sequence[Passage], rule: str, about: str) -> str:
    """Return the page.

    Args:
        passages: the texts, all of one model.
        rule: the selection that routed the tokens.
        about: a description of the model.
    """
    parts = ['<h1>Where extra steps run</h1>', f'<p>{html.escape(about)}</p>', *token_parts(passages, rule)]
    return page(f'{passages[0].title}: inner thinking', [Markup(part) for part in parts])


def token_parts(passages: Sequence[Passage], rule: str) -> list[str]:
    """Return the page's parts below its title, for any page: the selection, the key, and each passage."""
    names = passages[0].layer_steps
    most = max(1, max(int(passage.depth_S.max()) for passage in passages))
    parts = [
        f'<p>{RULES[rule]}</p>',
        '<p>The darker a token (on a dark screen: the brighter), the more extra steps it is routed to, over all '
        'thinking layers. Point at one for its gate values. In the table below, a row is one step of one layer '
        '(layers count from 0), and a filled cell (●) is a token that is routed to it.</p>',
        _key(most, len(names)),
    ]
    for passage in passages:
        parts += _passage(passage, most)
    return parts


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
            '<p class="note">The text is longer than the context of the model. It is read in '
            f'{len(passage.starts) + 1} separate parts, with a dashed line between them.</p>'
        )
    tokens = (
        ('<hr>' if i in passage.starts else '')
        + f'<span class="d{levels[i]}" title="{hovers[i]}">{_inline(piece)}</span>'
        for i, piece in enumerate(passage.pieces)
    )
    yield f'<div class="text">{"".join(tokens)}</div>'
    yield _fractions(passage)
    yield '<h3>Layer by layer</h3>'
    for first, end in _lines(passage.pieces, passage.starts):
        head = ''.join(
            f'<td class="d{levels[i]}">{html.escape(_plain(passage.pieces[i]))}</td>' for i in range(first, end)
        )
        rows = [f'<tr><th></th>{head}</tr>']
        for name, routed_S in zip(passage.layer_steps, passage.routed_MS, strict=True):
            cells = ''.join(
                f'<td{" class=y" if routed_S[i] else ""} title="{hovers[i]}">{"●" if routed_S[i] else ""}</td>'
                for i in range(first, end)
            )
            rows.append(f'<tr><th>{name}</th>{cells}</tr>')
        counts = ''.join(f'<td>{passage.depth_S[i]}</td>' for i in range(first, end))
        rows.append(f'<tr class="count"><th>steps</th>{counts}</tr>')
        yield f'<div class="wide"><table class="steps">{"".join(rows)}</table></div>'


def _fractions(passage: Passage) -> str:
    head = ''.join(f'<th>{name}</th>' for name in passage.layer_steps)
    routed = ''.join(f'<td>{fraction:.0%}</td>' for fraction in passage.routed_MS.mean(1))
    gate = ''.join(f'<td>{mean:.2g}</td>' for mean in passage.gate_MS.mean(1))
    return (
        f'<div class="wide"><table class="shares"><tr><th></th>{head}</tr>'
        f'<tr><th>tokens routed</th>{routed}</tr><tr><th>mean gate value</th>{gate}</tr></table></div>'
    )


def _hover(passage: Passage, i: int) -> str:
    steps = zip(passage.layer_steps, passage.gate_MS[:, i], passage.routed_MS[:, i], strict=True)
    lines = [f'“{passage.pieces[i]}”: {passage.depth_S[i]} of {len(passage.layer_steps)} extra steps']
    lines += [f'{name}: {gate:.3f}{" ●" if routed else ""}' for name, gate, routed in steps]
    return html.escape('\n'.join(lines)).replace('\n', '&#10;')


def _inline(piece: str) -> str:
    """Return the token for the running text; a line break is shown and also breaks the line."""
    return html.escape(piece).replace('\n', f'{NEWLINE}\n').replace('\t', f'{TAB}\t')


def _plain(piece: str) -> str:
    """Return the token for a cell of its own."""
    return piece.replace('\n', NEWLINE).replace('\t', TAB)


def _lines(pieces: Sequence[str], starts: set[int]) -> Iterator[tuple[int, int]]:
    """Yield first and end of the tokens of each line; a line ends where a window ends."""
    first, width = 0, 0
    for i, piece in enumerate(pieces):
        needed = max(2, len(_plain(piece))) + 1
        if i > first and (width + needed > LINE_CHARACTERS or i in starts):
            yield first, i
            first, width = i, 0
        width += needed
    if first < len(pieces):
        yield first, len(pieces)
