"""Avg@n, Pass@K and majority votes, and when a run takes them."""
