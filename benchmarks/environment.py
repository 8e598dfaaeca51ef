"""Imported for its effect, before torch: the profiler keeps quiet, and the package is found in the source tree where it
is not installed."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
if importlib.util.find_spec("clora_kernels") is None:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
