"""Figure 4, and every table of a study, from its stored results."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from itt_composer.analysis import html_page
from research.study.report import write_report
from research.study.study_file import YAMLS, Study, load_study

CAPTIONS = {
    'curves.png': 'Figure 4: loss against tokens and FLOPs.',
    'differences.png': 'Differences to the baseline, paired by seed.',
    'steps.png': 'Loss against steps.',
}


def stored_study(name: str) -> Study | None:
    """Return the study ``<file>_<scale>`` or ``<file>``; None where its study file is no longer shipped."""
    studies = YAMLS / 'studies'
    if (studies / f'{name}.yaml').is_file():
        return load_study(studies / f'{name}.yaml')
    stem, _, scale = name.rpartition('_')
    if (studies / f'{stem}.yaml').is_file() and (studies / 'parts' / 'scale' / f'{scale}.yaml').is_file():
        return load_study(studies / f'{stem}.yaml', [f'parts.scale={scale}'])
    return None


def draw_studies(results: Path, out: Path) -> list[Markup]:
    """Write the report of every study in ``results`` to ``OUT/<study>``.

    Returns:
        The index page's part about them.

    Raises:
        ValueError: results that do not fit their study.
    """
    parts: list[Markup] = []
    for table in sorted(results.glob('*/results.csv')):
        if (study := stored_study(table.parent.name)) is None:
            continue
        report = write_report(study, table.parent, out / study.name)
        link = f'{study.name}/{report.name}'
        heading = Markup('<h2>Study: {}</h2><p>Stored results. Tables: <a href="{}">{}</a></p>')
        parts.append(heading.format(study.title, link, link))
        for name, caption in CAPTIONS.items():
            if (picture := report.with_name(name)).is_file():
                parts.append(html_page.figure(picture.read_bytes(), caption))
    return parts
