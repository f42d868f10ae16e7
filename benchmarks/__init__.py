"""One script a question: ``python -m benchmarks.NAME [--sizes ...] [--json FILE]``;
all of them need ``.[bench]``.
"""
