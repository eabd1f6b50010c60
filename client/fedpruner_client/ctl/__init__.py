"""The `fedpruner` command: what operators and researchers do."""
