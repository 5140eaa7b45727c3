"""What scripts and the command line need: flags, run folders and queries."""
