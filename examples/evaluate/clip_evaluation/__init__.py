"""Evaluation of CLIP-like models: what the examples measure with."""
