"""Files and ASE: systems in, results out."""

from __future__ import annotations

from mdsens.specification import bundled_systems, load_system, relaxation_options

__all__ = ["bundled_systems", "load_system", "relaxation_options"]
