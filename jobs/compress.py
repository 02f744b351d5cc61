"""`ray job submit -- python jobs/compress.py CONFIG [--set a.b=c] [--run DIR]`: a model made smaller, as a Ray job.

The cluster that runs the job is the one it connects to, so `engine.address` need not be set.
"""

from __future__ import annotations

import os
import sys

from pipeline.cli import main

if __name__ == "__main__":
    os.environ.setdefault("RAY_ADDRESS", "auto")
    sys.argv.insert(1, "compress")
    main()
