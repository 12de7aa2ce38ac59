"""Kernels of slot cross-entropy and their launchers. Importing a module of these needs Triton."""
