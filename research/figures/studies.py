"""Figures 4 and 5, and every table of a study, from the results that are stored of it."""

from __future__ import annotations

import html
from pathlib import Path

from itt_composer.analysis import html_page
from research.study.report import write_report
from research.study.study_file import YAMLS, load_study

CAPTIONS = {
    'curves.png': 'Figure 4: loss against tokens and FLOPs.',
    'differences.png': 'Differences to the baseline, paired by seed.',
    'steps.png': 'Figure 5: loss against thinking steps.',
}


def draw_studies(results: Path, out: Path) -> list[str]:
    """Write the report of every study in ``results`` to ``OUT/<study>``.

    Returns:
        The index page's part about them, in HTML.

    Raises:
        ValueError: results that do not fit their study.
    """
    parts = []
    for table in sorted(results.glob('*/results.csv')):
        study = load_study(YAMLS / 'studies' / f'{table.parent.name}.yaml')
        report = write_report(study, table.parent, out / study.name)
        link = html.escape(f'{study.name}/{report.name}')
        parts.append(f'<h2>Study: {html.escape(study.title)}</h2><p>Its tables: <a href="{link}">{link}</a></p>')
        for name, caption in CAPTIONS.items():
            if (picture := report.with_name(name)).is_file():
                parts.append(html_page.figure(picture.read_bytes(), caption))
    return parts
