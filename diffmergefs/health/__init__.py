"""What `doctor` looks at and has to say."""
