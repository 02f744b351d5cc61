"""What can be done to a model to make it smaller: one file a step."""
