"""Whether a sensitivity can be trusted: is the minimum one, is it stable, how wrong can its
derivative be, how far does it reach.

Every figure is computed at the minimum as it is. The bounds of the error are estimates: the
constants in them hold along the way to the true minimum, and are taken where it starts.
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
