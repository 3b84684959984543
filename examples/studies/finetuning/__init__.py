"""Fine-tuning on a narrow set with and without the starting checkpoint as teacher, by a registered plan."""
