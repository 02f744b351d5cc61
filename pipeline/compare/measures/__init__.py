"""What a model is measured by: every measure gives a value per item, so that two models are compared pair by pair."""
