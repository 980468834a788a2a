"""Studies, figures, the quickstart page, synthetic tasks, cost predictions. Not in the wheel."""
