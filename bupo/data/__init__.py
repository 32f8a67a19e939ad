"""Turns files and data sets into tokenised prompts, and defines the order in which they are
used."""
