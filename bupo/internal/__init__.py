"""Every internal policy of a Hugging Face model, read: no training here."""

from bupo.internal.boundary import Boundary, boundary_layer, convergence
from bupo.internal.decomposition import DecompositionError, Layer, decomposed
from bupo.internal.distances import Distances, distances
from bupo.internal.entropy_flow import EntropyFlow, entropy_flow
from bupo.internal.lens import Lens, lens
from bupo.internal.texts import Text

__all__ = [
    "Boundary",
    "DecompositionError",
    "Distances",
    "EntropyFlow",
    "Layer",
    "Lens",
    "Text",
    "boundary_layer",
    "convergence",
    "decomposed",
    "distances",
    "entropy_flow",
    "lens",
]
