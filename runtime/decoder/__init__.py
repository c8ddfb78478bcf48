"""A decoder's rows between steps: what they read, what they keep, and what they are held to."""
