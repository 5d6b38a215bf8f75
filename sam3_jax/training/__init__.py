"""Training: losses, optimizer, state, step. Pure functions: no disk, clock or network."""
