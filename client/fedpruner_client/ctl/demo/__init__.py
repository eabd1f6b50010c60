"""`fedpruner demo`: a whole federation on one machine, with real processes and real text."""
