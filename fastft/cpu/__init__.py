"""CPU launchers: library products into buffers we own, C++ kernels for everything between."""
