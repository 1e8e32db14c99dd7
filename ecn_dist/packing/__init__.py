"""From a dataset folder to shards, offline: layouts, style copies, writing, validation."""
