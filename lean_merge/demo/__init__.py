"""A small trained family (base, expert, MLLM) and the tasks that measure it."""
