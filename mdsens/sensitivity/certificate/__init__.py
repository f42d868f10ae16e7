"""Certificates: whether a derivative of a relaxed configuration can be trusted.

A certificate tells whether a configuration is a minimum, whether it is stable, how large the error
of its derivative can be, and over which range of the parameters the derivative is valid.

Every figure is computed at the point where the relaxation ended. So the bounds of the error are
estimates: the constants in a rigorous bound would have to hold on the whole way from that point to
the true minimum, and are evaluated at that point only.
"""

from mdsens.sensitivity.certificate.certification import certify
from mdsens.sensitivity.certificate.parts import (
    CellState,
    ConstraintState,
    DerivativeCertificate,
    StrainState,
)
from mdsens.sensitivity.certificate.record import Certificate

__all__ = [
    "CellState",
    "Certificate",
    "ConstraintState",
    "DerivativeCertificate",
    "StrainState",
    "certify",
]
