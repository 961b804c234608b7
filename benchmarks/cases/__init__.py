"""What is measured, and what is exact. Uses nothing of the other folders."""
