"""A time module whose time passes when a test says so."""

import types


class Clock(types.SimpleNamespace):
    """Stands for the time module: its time passes when a test says so."""

    now = 100.0

    def monotonic(self):
        return self.now
