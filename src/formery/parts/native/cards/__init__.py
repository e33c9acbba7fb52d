"""The kernels of a graphics card: the same steps in Triton, recorded once and then played back."""
