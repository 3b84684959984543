"""Shared by the examples: open_clip's trainer, a queue with bars, records, statistics, reports."""
