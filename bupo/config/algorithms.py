"""Well-known algorithms: `algorithm=NAME` stands for a combination of settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bupo.config.errors import ConfigError, one_of
from bupo.config.objective import ADVANTAGES

ALGORITHMS: dict[str, dict[str, Any]] = {
    "bupo": {"policy": "bupo"},
    "internal": {"policy": "internal"},
    "custom": {"policy": "custom"},
    **{name: {"policy": "final", "advantage": name} for name in ADVANTAGES},
    "gspo": {"policy": "final", "loss": {"type": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}},
    # CISPO bounds the ratio from above only.
    "cispo": {"policy": "final", "loss": {"type": "cispo", "clip_low": 1.0, "clip_high": 4.0}},
}
ALGORITHMS["dr_grpo"]["loss"] = {"aggregation": "seq_sum_longest"}


def take_algorithm(given: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Removes `algorithm` from the settings of one command line or file, and returns the settings
    that the last one stands for; none without it.

    Raises ConfigError for an unknown name, and for a policy that is given and contradicts it.
    """
    names = [settings.pop("algorithm") for settings in given if "algorithm" in settings]
    if not names:
        return {}
    one_of("algorithm", names[-1], tuple(ALGORITHMS))
    implied = ALGORITHMS[names[-1]]
    policies = [settings["policy"] for settings in given if "policy" in settings]
    if policies and policies[-1] != implied["policy"]:
        raise ConfigError(
            f"algorithm={names[-1]} means policy={implied['policy']}, but policy={policies[-1]} is "
            "given as well: leave one of them out"
        )
    return implied
