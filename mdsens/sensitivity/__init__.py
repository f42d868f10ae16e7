"""Derivatives of a minimum by the implicit function theorem, with certificates of accuracy."""

from mdsens.sensitivity.certificate import Certificate, certify
from mdsens.sensitivity.derivatives import gradient, jacobian, jvp, linearize, response, vjp
from mdsens.sensitivity.equilibration import equilibrate
from mdsens.sensitivity.linearization import Linearization
from mdsens.sensitivity.results import DirectionalDerivative, Displacement, ParameterGradient

__all__ = [
    "Certificate",
    "Linearization",
    "DirectionalDerivative",
    "Displacement",
    "ParameterGradient",
    "certify",
    "equilibrate",
    "gradient",
    "jacobian",
    "jvp",
    "linearize",
    "response",
    "vjp",
]
