"""Integrations with other training libraries: transformers and TRL."""
