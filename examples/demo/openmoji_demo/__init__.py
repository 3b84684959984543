"""RankCLIP on emojis: the parts behind ``examples/demo/run.py``."""
