"""Heads on frozen encoders: spread, smoothing and CLIP's loss with the same dropout, and each at its best."""
