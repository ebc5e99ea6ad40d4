"""Runs benchmarks: python jobs/benchmark.py NAME --json FILE"""

import sys
from pathlib import Path

# Import the package from this checkout (in a Ray job, from its uploaded copy), even if another version is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from savant_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
