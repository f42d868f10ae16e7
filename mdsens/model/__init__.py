"""The model of a system: positions, cell, parameters and neighbor list; batches of systems."""
