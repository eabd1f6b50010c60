"""What training costs in memory: the byte model against the kernel, and what the method saves."""
