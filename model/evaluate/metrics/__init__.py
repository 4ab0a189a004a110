"""All metrics by name; a new one is a file here and its line below."""

from model.evaluate.metric import Metric
from model.evaluate.metrics.clip_fid import ClipFid
from model.evaluate.metrics.clip_i import ClipI
from model.evaluate.metrics.clip_t import ClipT
from model.evaluate.metrics.consistency import Consistency
from model.evaluate.metrics.copy_guard import CopyGuard
from model.evaluate.metrics.dino_i import DinoI
from model.evaluate.metrics.dynamic_degree import DynamicDegree
from model.evaluate.metrics.dynamics import Dynamics
from model.evaluate.metrics.face import Face
from model.evaluate.metrics.fid import Fid
from model.evaluate.metrics.flicker import Flicker
from model.evaluate.metrics.frozen import Frozen
from model.evaluate.metrics.fvd import Fvd
from model.evaluate.metrics.inception_score import Is, IsI3d
from model.evaluate.metrics.kid import Kid
from model.evaluate.metrics.kvd import Kvd
from model.evaluate.metrics.subject import Subject

METRICS: dict[str, type[Metric]] = {
    metric.name: metric
    for metric in (
        *(Fvd, Kvd, Fid, ClipFid, Kid, Is, IsI3d),
        *(ClipT, ClipI, DinoI, Subject, Face, CopyGuard),
        *(Consistency, Flicker, Dynamics, DynamicDegree, Frozen),
    )
}
