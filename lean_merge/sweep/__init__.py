"""Many merges of one recipe at different parameters, and a table of what came of them."""
