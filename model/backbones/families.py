"""Every family of pretrained transformers, by the name of its class in diffusers."""

from model.backbones.family import Family
from model.backbones.ltx import Ltx
from model.backbones.skyreels import SkyReels
from model.backbones.wan import Wan

FAMILIES: dict[str, Family] = {family.transformer: family for family in (Wan(), Ltx(), SkyReels())}
