"""Submodels in torch: find the halves of a layer, stub what is dropped, load what is kept.

The one part of the common package that imports torch and transformers. The agent's training
process and the coordinator's torch jobs use it; neither daemon's own process does.
"""
