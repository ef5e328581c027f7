"""The pieces of bench/reproduce.py."""
