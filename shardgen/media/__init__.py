"""Footage and pictures: found, fetched, probed and decoded."""
