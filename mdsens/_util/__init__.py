"""Helpers of all rooms, without physics: outcomes, validation, progress, tables, lattices."""
