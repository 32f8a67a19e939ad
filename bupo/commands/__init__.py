"""What `python -m bupo.run`, `bupo.evaluate` and `bupo.analyze` do: arguments, plan, execution."""

import os

# Before torch loads OpenMP: threads that wait by spinning cost a busy machine a factor of ten and
# more on models of this size, and gain an idle one nothing that can be seen.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
