"""Fine-tuning the embedded families with and without DRIFT, and what came of it."""
