"""What makes up for removed units before anything is trained: one file a method."""
