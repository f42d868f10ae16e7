"""What every room uses and no physics: statuses, validation, progress, tables, memory, lattices."""
