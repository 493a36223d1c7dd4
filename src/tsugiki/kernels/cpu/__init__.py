"""Bodies of kernels/ compiled for this CPU where a C++ compiler is found."""
