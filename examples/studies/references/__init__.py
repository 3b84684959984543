"""Graded lists that keep what the model knows: list losses with and without a frozen model's scores."""
