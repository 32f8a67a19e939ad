"""bupo in other trainers: bupo.integrations.trl."""
