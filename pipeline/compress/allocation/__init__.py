"""How much from which layer: one file a rule."""
