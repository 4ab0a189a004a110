"""Dynamic degree (Dync-D of MSRVTT-Personalization, VBench): the share of videos in which much moves.

A video counts when, in a quarter of its pairs of neighbouring frames, the mean of the 5 % greatest lengths of
RAFT's optical flow exceeds 6 pixels for each 256 of the shorter side. The protocol looks at 8 frames a second.
"""

from model.evaluate.metric import Features, MeanMetric

FLOW_PX, PER_PX = 6.0, 256.0
MOVING_FRAC = 0.25


class DynamicDegree(MeanMetric):
    name, needs, better = "dynamic_degree", ("raft",), "neither"

    def value(self, video: Features, prompt: Features) -> float | None:
        """`raft`: for each pair, flow as a share of the shorter side."""
        flow = video["raft"]
        if not len(flow):
            return None
        moving = int((flow > FLOW_PX / PER_PX).sum())
        return float(moving >= max(1, round(MOVING_FRAC * (len(flow) + 1))))
