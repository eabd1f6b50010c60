"""What the coordinator and the agents must agree on. Importing it never imports torch."""

__version__ = "0.1.0"
