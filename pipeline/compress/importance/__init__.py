"""A number per unit: one file a criterion."""
