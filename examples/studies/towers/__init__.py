"""Pretrained towers that are trained together, after heads on them."""
