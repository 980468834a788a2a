"""Task scores: lm-eval with the paper's tasks, Table 1, and data for offline tasks."""
