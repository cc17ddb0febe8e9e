"""What has given wrong bytes, as one table: where a diff lies, how it was written, what must be."""
