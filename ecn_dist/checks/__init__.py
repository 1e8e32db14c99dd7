"""Before a run: dry run and doctor."""
