"""One file per command, named like it; group.py finds them. Nothing but commands belongs here."""
