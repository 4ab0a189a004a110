"""The ground: config, errors, storage, the Ray session, progress, CLIP."""

import os

# Threads of one operation that wait for each other sleep instead of spinning: on a busy machine, or with as many
# workers as cores, spinning keeps the one that is waited for from its core (128 small videos beside other jobs:
# 39 s, and not a batch of them in four minutes). Read when torch is first loaded, so set before that.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
