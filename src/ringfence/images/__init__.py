"""How people get guests: an image folder, distribution kernels through apt, a built-in guest."""
