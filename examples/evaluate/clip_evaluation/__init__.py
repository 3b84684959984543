"""Evaluation of CLIP-like models: the parts behind ``examples/evaluate/run.py``, each of use on its own."""
