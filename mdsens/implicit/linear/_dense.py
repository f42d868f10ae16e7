from mdsens.implicit.linear.direct import one_by_one as _one_by_one  # noqa
