"""What the unit tests of a module share with its tests in the other folders, by module."""
