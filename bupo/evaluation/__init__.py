"""Avg@n, Pass@K and majority votes on data sets."""
