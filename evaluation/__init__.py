"""How near a set of images is to another. It knows no network that made them."""
