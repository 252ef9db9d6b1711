"""Label files: bytes to Label."""
