"""Downloads files of the Hugging Face hub: from the local cache, else the network, else an error in seconds."""

import os

from infra.errors import ConfigError, first_line

REACH_TIMEOUT_S = 5.0
OFFLINE_CURE = (
    "use the offline CLIP (name: offline), or a local config and checkpoint "
    "(name: <config>.json, pretrained: <weights>), or fetch the weights where there is a network"
)


def hub_file(repository: str, names: list[str], *, wanted: str, cure: str = OFFLINE_CURE) -> str:
    """Path of the first of `names` that the repository has; the cache is asked first.

    `wanted` and `cure` are for the message.

    Raises:
        ConfigError: the hub can't be reached, or has no such repository or file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    cached = require_hub_file(repository, names, wanted=wanted, cure=cure)
    if cached:
        return cached
    for name in names:
        try:
            return hf_hub_download(repository, name)
        except LocalEntryNotFoundError as error:  # the network broke off, whatever its name says
            raise ConfigError(f"can't fetch {wanted}: {first_line(error)}", cure=cure) from None
        except EntryNotFoundError:
            continue
        except GatedRepoError:
            raise ConfigError(
                f"{repository} on the hub is gated (for {wanted})",
                cure="accept its terms there, and set HF_TOKEN to a token of that account",
            ) from None
        except RepositoryNotFoundError:
            raise ConfigError(f"the hub has no repository {repository!r} (for {wanted})") from None
        except OSError as error:
            raise ConfigError(f"can't fetch {wanted}: {first_line(error)}", cure=cure) from None
    raise ConfigError(f"{repository} on the hub has none of {', '.join(names)} (for {wanted})")


def require_hub_file(repository: str, names: list[str], *, wanted: str, cure: str = OFFLINE_CURE) -> str | None:
    """Path of the first of `names` in the local cache; None if none is, but the hub can be asked.

    Raises:
        ConfigError: no folder and no name of a repository; or not in the cache, and the hub can't be reached.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in names:
        try:
            cached = try_to_load_from_cache(repository, name)
        except HFValidationError:
            raise ConfigError(
                f"{repository!r} is no folder, and no name of a repository on the hub",
                legal="a folder that is there, or organisation/model",
                cure=cure,
            ) from None
        if isinstance(cached, str):
            return cached
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    require_reachable(endpoint, wanted=wanted, cure=cure)
    return None


def require_reachable(url: str, *, wanted: str, cure: str = OFFLINE_CURE) -> None:
    """One request with a short time-out; proxies from the environment are honoured.

    Raises:
        ConfigError: no answer, or the environment forbids the network (`HF_HUB_OFFLINE`).
    """
    import httpx

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ConfigError(
            f"{wanted} is not in the local cache and HF_HUB_OFFLINE forbids fetching it",
            cure=cure,
        )
    try:
        httpx.head(url, timeout=REACH_TIMEOUT_S, follow_redirects=False)
    except httpx.HTTPError as error:
        raise ConfigError(
            f"can't fetch {wanted}: {httpx.URL(url).host} can't be reached ({error})", cure=cure
        ) from None
