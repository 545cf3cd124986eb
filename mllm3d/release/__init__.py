"""Export of a run's checkpoint as a folder that Hugging Face calls load."""
