"""`dataset_tps.py` with the fake loader, for tests that need a process to kill."""

import sys

import dataset_tps

if __name__ == "__main__":
    sys.exit(dataset_tps.main(loader="tests.benchmark.fake_loader"))
