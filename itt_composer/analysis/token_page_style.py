"""How the page of tokens looks: on light and dark screens, on paper, and to the colour-blind."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import to_hex, to_rgb

# One hue, of which a deeper token has more: told apart by the colour-blind and in grey print. The number of steps also
# stands beneath each token.
LEVELS = 8
SCHEMES = {
    'light': {'ink': '#111111', 'paper': '#ffffff', 'faint': '#5c5c5c', 'line': '#cccccc', 'shade': '#00406e'},
    'dark': {'ink': '#ffffff', 'paper': '#0b0c0e', 'faint': '#aaaaaa', 'line': '#444444', 'shade': '#7cc8f2'},
}
STYLE = """
* { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; color: var(--faint); }
.note { color: var(--faint); font-size: .9rem; }
.text { font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { padding: .15em 0; border-radius: 2px; }
table { border-collapse: collapse; margin: .6rem 0; }
.steps { font: 12px/1.3 ui-monospace, monospace; break-inside: avoid; }
.steps th { font-weight: 600; text-align: right; padding-right: .6em; color: var(--faint); }
.steps td { border: 1px solid var(--line); text-align: center; padding: .1em .15em; min-width: 1.2em;
  white-space: pre; }
.steps td.y { background: var(--shade); color: var(--paper); }
.steps tr.count td { border: none; color: var(--faint); }
.shares { font-size: .9rem; }
.shares td, .shares th { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
.key span { display: inline-block; min-width: 2.2em; text-align: center; font: 13px ui-monospace, monospace; }
hr { border: none; border-top: 1px dashed var(--faint); margin: .6rem 0; }
"""


def style() -> str:
    """The page's CSS: light, dark where the reader's screen is, and light on paper."""
    dark = f'@media screen and (prefers-color-scheme: dark) {{\n{_colours("dark")}}}\n'
    return f':root {{ color-scheme: light dark; }}\n{_colours("light")}{dark}{STYLE}'


def _colours(name: str) -> str:
    scheme = SCHEMES[name]
    variables = ' '.join(f'--{key}: {colour};' for key, colour in scheme.items())
    levels = [
        f'.d{level} {{ background: {back}; color: {ink}; }}\n' for level, (back, ink) in enumerate(shades(scheme))
    ]
    return f':root {{ {variables} }}\n{"".join(levels)}'


def shades(scheme: Mapping[str, str]) -> list[tuple[str, str]]:
    """Background and text colour of each level of depth; the text takes whichever of ink and paper is read better."""
    paper, shade = (np.array(to_rgb(scheme[name])) for name in ('paper', 'shade'))
    levels = []
    for level in range(LEVELS + 1):
        back = to_hex(paper + (shade - paper) * 0.92 * level / LEVELS)
        levels.append((back, max((scheme['ink'], scheme['paper']), key=lambda ink: contrast(ink, back))))
    return levels


def contrast(a: str, b: str) -> float:
    """The contrast of two colours, 1 to 21, as the Web Content Accessibility Guidelines count it."""
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
