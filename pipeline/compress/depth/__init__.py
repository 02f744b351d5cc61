"""Leaving out branches of a model to see what they are for: reruns, distances, choices."""
