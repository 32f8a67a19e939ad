"""bupo in other people's loops: bupo.integrations.transformers and bupo.integrations.trl."""
