"""Run files: composed, checked, and resolved into the config that foundry takes."""
