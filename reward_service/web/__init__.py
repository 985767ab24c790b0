"""HTTP application and server."""
