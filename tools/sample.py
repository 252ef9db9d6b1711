"""The old name of tools.generate: says so and does nothing."""

import sys

if __name__ == "__main__":
    sys.exit(
        "tools.sample is called tools.generate now, with the same options: python -m tools.generate"
    )
