"""Data beside the pairs, through the data path of open_clip's trainer: the path, and each kind of data."""
