"""The stages of a build, each from one status to the next."""
