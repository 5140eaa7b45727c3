"""Command line: commands, flags, run folders and queries."""
