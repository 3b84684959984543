"""``--loss`` for the unmodified ``python -m open_clip_train.main``: RankCLIP, CyCLIP, ALIP, and others.

Nothing is imported here: torch loads :mod:`rankloss_open_clip.bootstrap` in every program that imports torch,
so this package costs nothing until open_clip's trainer is imported.
"""
