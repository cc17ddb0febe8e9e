"""Serving images to Firecracker's `Uffd` memory backend, page by page."""
