"""The catalog of a build: all SQL."""
