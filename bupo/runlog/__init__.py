"""What a run writes and shows: metrics, progress, the watchdog, and the request to stop."""
