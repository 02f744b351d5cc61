"""Training that heals a model which was made smaller: one file a method."""
