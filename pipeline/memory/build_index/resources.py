"""What an embedding worker gets of the session that is running."""

from typing import Any


def worker_resources(num_workers: int | None, threads: int | None = None) -> tuple[str, int, dict[str, Any]]:
    """(device, threads of a worker, options of `run_units`); call inside a `ray_session`.

    Args:
        num_workers: embedding workers; None = one a GPU, or one for every 8 CPUs.
        threads: of each worker; None = its share of the CPUs, at most 8.
    """
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    workers = num_workers or gpus or max(1, cpus // 8)
    threads = threads or max(1, min(8, cpus // workers))
    # One worker on CPUs needs no actor: Ray gives it the same process, and the model in it, again.
    options = {
        "num_workers": workers,
        "num_cpus": min(threads, cpus),
        "num_gpus": 1.0 if gpus else 0.0,
        "actors": workers > 1 or gpus > 0,
    }
    return ("cuda" if gpus else "cpu"), threads, options
