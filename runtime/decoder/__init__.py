"""A decoder's rows between steps: what they read, and what they keep."""
