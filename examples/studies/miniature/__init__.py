"""RankCLIP's tables and figures in miniature, and comparisons that were fixed before their records."""
