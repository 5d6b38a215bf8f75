"""Training runs: configuration, data, state, logs and checkpoints around the pure step."""
