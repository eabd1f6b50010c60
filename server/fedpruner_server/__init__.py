"""The coordinator: holds the global model and adapter, plans, streams, aggregates, publishes."""
