"""Registers the transfer engine for CPUs with vLLM, which loads this in each of its processes
(entry point in pyproject.toml)."""

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from bupo.rollouts.vllm_serving import GLOO


def register() -> None:
    """May be called more than once."""
    if GLOO not in WeightTransferEngineFactory._registry:
        module = "bupo.rollouts.vllm_transfer"
        WeightTransferEngineFactory.register_engine(GLOO, module, "GlooWeightTransferEngine")
