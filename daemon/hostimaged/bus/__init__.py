"""The daemon's objects on the bus."""
