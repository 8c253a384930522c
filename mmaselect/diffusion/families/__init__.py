"""One file per architecture. A new family is a new file here and one more name in ``FAMILIES``.

A family of one's own needs neither: ``FAMILIES['Mine'] = Mine``, see docs/en/add_a_network.md.
"""

from mmaselect.diffusion.families.adm import ADM
from mmaselect.diffusion.families.dit import DiT
from mmaselect.diffusion.families.flux import Flux
from mmaselect.diffusion.families.flux2 import Flux2
from mmaselect.diffusion.families.hunyuan_dit import HunyuanDiT
from mmaselect.diffusion.families.lumina2 import Lumina2
from mmaselect.diffusion.families.pixart import PixArt
from mmaselect.diffusion.families.qwen_image import QwenImage
from mmaselect.diffusion.families.sana import Sana
from mmaselect.diffusion.families.sd3 import SD3
from mmaselect.diffusion.families.sit import SiT
from mmaselect.diffusion.families.unet import UNet
from mmaselect.diffusion.families.z_image import ZImage

FAMILIES = {
    family.name: family
    for family in (SD3, DiT, SiT, UNet, Flux, PixArt, Sana, ADM, HunyuanDiT, Flux2, QwenImage, ZImage, Lumina2)
}

__all__ = [
    'ADM',
    'FAMILIES',
    'SD3',
    'DiT',
    'Flux',
    'Flux2',
    'HunyuanDiT',
    'Lumina2',
    'PixArt',
    'QwenImage',
    'Sana',
    'SiT',
    'UNet',
    'ZImage',
]
