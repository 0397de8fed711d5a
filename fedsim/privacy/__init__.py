"""What clients give away, and what is done about it."""
