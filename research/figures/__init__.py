"""The paper's pictures: what a model does is measured into small tables, and pictures are drawn from the tables.

Nothing here imports composer, so that the commands start immediately; the callbacks draw with the same functions.
"""
