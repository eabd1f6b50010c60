"""What the coordinator and the agents must agree on. Importing it never imports torch."""

import os

# A fork beside a live channel aborts the process when gRPC's fork handlers are on. Nothing here
# forks: children are started with exec. Must be set before grpc is imported anywhere.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

__version__ = "0.1.0"
