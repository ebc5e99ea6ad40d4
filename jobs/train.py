"""Trains a run, or resumes it: python jobs/train.py --config configs/savant.yaml"""

import sys
from pathlib import Path

# Import the package from this checkout (in a Ray job, from its uploaded copy), even if another version is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from savant_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
