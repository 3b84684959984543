"""In-batch ranking by ordered ids, and batches drawn with neighbours, by a registered plan."""
