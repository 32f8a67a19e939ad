"""Every internal policy of a Hugging Face model, read: no training here."""

from bupo.internal.boundary import Boundary, boundary_layer, convergence
from bupo.internal.decomposition import DecompositionError, Layer, decomposed
from bupo.internal.entropy_flow import EntropyFlow, Text, entropy_flow

__all__ = [
    "Boundary",
    "DecompositionError",
    "EntropyFlow",
    "Layer",
    "Text",
    "boundary_layer",
    "convergence",
    "decomposed",
    "entropy_flow",
]
