"""What happens to a model between the steps of its recovery: one file a method."""
