"""Measurements; not collected by pytest. Each prints JSON lines with machine and commit."""
