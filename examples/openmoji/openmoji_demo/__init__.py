"""RankCLIP on emojis: the parts behind ``examples/openmoji/run.py``."""
