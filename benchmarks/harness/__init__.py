"""Times, the environment and results files. Uses nothing of the other folders."""
