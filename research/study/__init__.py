"""Studies: many runs, paired by seed, on this machine or a cluster; their tables, figures and intervals."""
