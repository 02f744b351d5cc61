"""Makes a model smaller: what to remove (importance), from where (allocation), how (surgery), what makes up for it."""
