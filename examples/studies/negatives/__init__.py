"""Hard negatives and preferences, trained from the start and in fine-tuning, beside mimicry of the start."""
