"""Turns files and data sets into tokenised prompts, and orders these for the steps."""
