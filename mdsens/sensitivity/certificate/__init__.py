"""Whether a sensitivity can be trusted.

A certificate tells whether a configuration is a minimum, whether it is stable, how large the error
of its derivative can be, and over which range of the parameters the derivative is valid.

Every figure is computed at the point where the relaxation ended. So the bounds of the error are
estimates: the constants in them should bound derivatives all along the way from that point to the
true minimum, and are evaluated at that point only.
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
