"""Comparisons that are fixed before their first training: the engine behind ``study.py``."""
