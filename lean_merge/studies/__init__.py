"""Users of the engine that answer questions about a merge: analyze, compare, sweep."""
