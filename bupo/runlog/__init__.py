"""What a run writes and displays: metrics, progress, stalled stages; and how it is stopped."""
