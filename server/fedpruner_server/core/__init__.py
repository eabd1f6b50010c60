"""The coordinator's decisions: pure functions of their arguments.

No clock, network, disk, log or torch here. Time, randomness and ids come in as arguments, so that
replaying a journal through the same functions gives the same decisions.
"""
