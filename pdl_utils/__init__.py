"""Shared code of the Practical Deep Learning notebooks: one module, one idea."""
