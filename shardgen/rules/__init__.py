"""Pure rules: values to a verdict, windows, shards."""
