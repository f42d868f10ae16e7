"""First-order saddle points of the energy, and the energy barriers from minima to saddles."""

from mdsens.saddles._eigenvector_following import EigenvectorFollowing
from mdsens.saddles._elastic_band import ElasticBand
from mdsens.saddles.barriers import Barrier, barrier
from mdsens.saddles.search import find_saddle, sides

__all__ = [
    "Barrier",
    "EigenvectorFollowing",
    "ElasticBand",
    "barrier",
    "find_saddle",
    "sides",
]
