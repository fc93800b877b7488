"""K-FAC: natural gradients from Kronecker factors of the curvature."""
