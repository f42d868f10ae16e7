"""Inverse design: parameters that give a relaxed system the properties that are wanted."""

from mdsens.design._features import FEATURES, Elastic, Softest, Target
from mdsens.design._fit import fit, hold
from mdsens.design._history import Design, State, Step
from mdsens.design._response import FeatureResponse, feature_response
from mdsens.design._step import LevenbergMarquardt, Optax
from mdsens.design._variables import Free

__all__ = ["FEATURES", "Design", "Elastic", "FeatureResponse", "Free", "LevenbergMarquardt", "Optax", "Softest"]
__all__ += ["State", "Step", "Target", "feature_response", "fit", "hold"]
