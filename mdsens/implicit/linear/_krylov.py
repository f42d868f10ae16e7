from mdsens.implicit.linear._vectors import Apply, Iterate, dot, norm, safe_divide  # noqa
from mdsens.implicit.linear.cg import cg  # noqa
