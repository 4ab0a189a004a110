"""Every family of pretrained transformers, by the name of its class in diffusers."""

from model.backbones.family import Family
from model.backbones.wan import Wan

FAMILIES: dict[str, Family] = {family.transformer: family for family in (Wan(),)}
