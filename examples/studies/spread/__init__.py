"""The spread of each modality: what pairs alone gain by it, and what ranks add to it."""
