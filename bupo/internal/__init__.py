"""Analysis of every internal policy of a Hugging Face model, without training."""

from bupo.internal.analysis import Analysis, analyse
from bupo.internal.boundary import Boundary, boundary_layer, convergence
from bupo.internal.checks import Check, IdentityError, identities
from bupo.internal.curves import Curve
from bupo.internal.decomposition import DecompositionError, Layer, decomposed
from bupo.internal.distances import Distances, distances, kl_between
from bupo.internal.entropy_flow import EntropyFlow, entropy_flow
from bupo.internal.lens import Lens, lens
from bupo.samples import Sample

__all__ = [
    "Analysis",
    "Boundary",
    "Check",
    "Curve",
    "DecompositionError",
    "Distances",
    "EntropyFlow",
    "IdentityError",
    "Layer",
    "Lens",
    "Sample",
    "analyse",
    "boundary_layer",
    "convergence",
    "decomposed",
    "distances",
    "entropy_flow",
    "identities",
    "kl_between",
    "lens",
]
