"""Optimality conditions of common problems, and the projections and proximal operators in them."""
