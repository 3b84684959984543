"""Heads on frozen encoders: what spread, ranks and smoothing add to CLIP's loss there."""
