"""Data sets: real first, never silently something else."""
