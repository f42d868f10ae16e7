"""What a system is: positions, cell, parameters, neighbor list; batches of systems."""
