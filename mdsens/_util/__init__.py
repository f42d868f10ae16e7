"""Helpers for the whole package: outcomes of computations, validation, progress, tables, cells."""
