"""Studies: many runs of run files, paired by seed, on this machine or a cluster; their table, curves and intervals."""
