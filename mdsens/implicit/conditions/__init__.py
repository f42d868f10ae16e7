"""Optimality conditions of minimization problems, with the projections that appear in them."""
