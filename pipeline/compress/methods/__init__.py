"""Published combinations of importance, allocation and compensation: one file a method."""
