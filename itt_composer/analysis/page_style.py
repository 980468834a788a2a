"""The style of all pages: for light and dark screens, paper, phones and colour-blind readers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# One hue, darker for more extra steps, for colour-blind readers and grey print. The number of steps is printed too.
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
.wide { overflow-x: auto; }
.rows td, .rows th { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; }
.rows td:first-child, .rows th:first-child, .prose td, .prose th { text-align: left; vertical-align: top; }
@media (max-width: 30rem) { .rows, .shares { font-size: .8rem; } .rows td, .rows th { padding: .3rem .25rem; } }
img { max-width: 100%; background: #ffffff; } figure { margin: 1.5rem 0; }
figcaption { color: var(--faint); font-size: .9rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; padding: .8rem;
  border: 1px solid var(--line); border-radius: 4px; font: 13px/1.45 ui-monospace, monospace; }
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
    """Return the CSS: light, dark on a dark screen, light on paper."""
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
    """Return background and text colour of each level; the text has the colour, ink or paper, of higher contrast."""
    paper, shade = (_rgb(scheme[name]) for name in ('paper', 'shade'))
    levels = []
    for level in range(LEVELS + 1):
        mixed = paper + (shade - paper) * 0.92 * level / LEVELS
        back = '#' + ''.join(f'{round(255 * value):02x}' for value in mixed)
        levels.append((back, max((scheme['ink'], scheme['paper']), key=lambda ink: contrast(ink, back))))
    return levels


def contrast(a: str, b: str) -> float:
    """Return the contrast ratio of two colours, 1 to 21 (Web Content Accessibility Guidelines)."""
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    rgb = _rgb(colour)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
