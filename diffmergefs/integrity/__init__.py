"""What is recorded of layers, and compared: seals, pins, and what was verified."""
