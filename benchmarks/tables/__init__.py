"""What is shown of results files. Uses the harness."""
