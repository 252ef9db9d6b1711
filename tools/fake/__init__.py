"""Made-up corpora, checkpoints, datasets and batches, for tests, benchmarks and the demo."""
