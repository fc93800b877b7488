"""How the curvature of a layer's weights is approximated."""
