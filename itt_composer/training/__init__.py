"""The trainer side: the ComposerModel, one run, its manifest, checkpoints and logs."""
