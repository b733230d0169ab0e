"""What a model's forward takes, and with which shapes."""
