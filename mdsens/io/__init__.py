"""Reading systems, storing results, and converting to and from ASE, which is imported on demand."""

from __future__ import annotations

from mdsens.io.ase_calculator import as_calculator
from mdsens.io.ase_structures import from_ase, to_ase, write_extxyz
from mdsens.io.npz import load, read_header, save
from mdsens.io.potential_files import read_potential
from mdsens.io.system_toml import bundled_systems, load_system, relaxation_options, systems_folder

__all__ = [
    "as_calculator",
    "bundled_systems",
    "from_ase",
    "load",
    "load_system",
    "read_header",
    "read_potential",
    "relaxation_options",
    "save",
    "systems_folder",
    "to_ase",
    "write_extxyz",
]
