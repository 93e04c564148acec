"""Neural networks and adapters; modules here never open files or the network."""
