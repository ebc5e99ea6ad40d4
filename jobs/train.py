"""Trains a run, or goes on with it: python jobs/train.py --config configs/savant.yaml"""

import sys
from pathlib import Path

# The working folder of a Ray job is a copy: the code beside this file is meant, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from savant_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
