"""Kernels of insertion attention and their launchers. Importing a module of these needs Triton."""
