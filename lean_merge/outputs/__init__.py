"""What a merge makes of its decisions: one file for each kind of output."""
