"""Where Photon meets the framework: its training recipes, and its adapter for inference."""
