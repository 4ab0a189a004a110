"""The ground: config, errors, storage, the Ray session, progress, CLIP."""

import os

# Threads of one operation that wait for each other sleep instead of spinning: where there are more of them than
# cores, spinning keeps the one that is waited for from its core (128 small videos beside other jobs took 39 s;
# before, not a batch of 32 came in four minutes). Read when torch is first loaded, so it is set before that.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
