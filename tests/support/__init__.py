"""What the tests share: files, file systems, mounts and users to test with."""
