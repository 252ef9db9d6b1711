"""What a build tells people."""
