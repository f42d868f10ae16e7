"""Inverse design: find the parameters that give a relaxed system the wanted properties."""

from mdsens.design.fitting import fit
from mdsens.design.history import Design, State, Step
from mdsens.design.methods import LevenbergMarquardt, Optax
from mdsens.design.responses import FeatureResponse, feature_response
from mdsens.design.targets import FEATURES, Elastic, Softest, Target, hold
from mdsens.design.variables import Free

__all__ = [
    "FEATURES",
    "Design",
    "Elastic",
    "FeatureResponse",
    "Free",
    "LevenbergMarquardt",
    "Optax",
    "Softest",
    "State",
    "Step",
    "Target",
    "feature_response",
    "fit",
    "hold",
]
