"""What joins slice-wise models to the framework."""
