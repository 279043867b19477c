"""What an image is asked to be."""
