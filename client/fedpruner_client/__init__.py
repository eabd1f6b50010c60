"""The agent: measures its memory, fetches its own slice, trains it, uploads the adapter."""
