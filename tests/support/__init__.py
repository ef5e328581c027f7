"""What the tests share: checkpoints made by hand, oracles, and ways to break things."""
