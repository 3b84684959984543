"""What several examples use: starting open_clip's trainer, a queue with bars, tables."""
