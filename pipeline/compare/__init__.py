"""Comparisons: matched arms, trained and measured the same way."""
