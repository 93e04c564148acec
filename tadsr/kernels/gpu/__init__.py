"""The Triton kernels and how they are launched; importing a module of it imports Triton."""
