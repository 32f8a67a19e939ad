"""The commands `python -m bupo.run`, `bupo.evaluate` and `bupo.analyze`."""

import os

# This must be set before torch loads OpenMP. On a busy machine, threads that spin while they wait
# slow models of this size down by a factor of ten or more; on an idle one they gain nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
