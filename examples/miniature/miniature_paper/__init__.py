"""RankCLIP's tables and figures in miniature, on icons: train, measure, record, report."""
