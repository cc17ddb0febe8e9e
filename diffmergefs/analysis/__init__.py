"""Facts about views; nothing is written."""
