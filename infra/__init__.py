"""The ground: config, errors, storage, the Ray session, progress, CLIP."""

import os

# Threads of one operation that wait for each other sleep instead of spinning: where there are more of them than
# cores, spinning keeps the one that is waited for from its core (`make evidence` beside other jobs: 128 videos
# in 28 s, where not a batch of 32 came in four minutes). Read when torch is first loaded, so set before that.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
