"""`--loss rankclip` for the unmodified ``python -m open_clip_train.main``."""
