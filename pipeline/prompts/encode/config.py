"""What the job of `vimi-data encode` may be told; what is encoded, and by what, the trainer's config says."""

from pydantic import Field

from infra.cluster import RayConfig
from infra.config import Config


class EncodeJobConfig(Config):
    """Where encodings go, and who makes them."""

    prompts: str
    """Folder or URI of certified prompt shards."""
    out: str
    """Folder or URI of the encodings."""
    max_failed_frac: float = Field(default=0.1, ge=0, le=1)
    """The job fails when more than this share of the rows can't be encoded. Ours."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of a worker; 0 = the encoders run on CPUs. With GPUs workers live as long as the job."""
    num_workers: int | None = Field(default=None, ge=1)
    """Workers at once; None = as many as the CPUs (or GPUs) allow."""
    ray: RayConfig = RayConfig()
