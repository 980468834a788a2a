"""Training configs: composed, checked, and resolved into the config that foundry takes."""
