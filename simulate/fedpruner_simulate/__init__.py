"""Many virtual devices in one process: the same plans, the same training, no network."""
