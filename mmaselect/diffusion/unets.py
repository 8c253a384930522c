"""What U-Nets have in common: units, and the names of their activations."""

from __future__ import annotations

from typing import Any

from mmaselect.diffusion.family import DiffusersModule, Family
from mmaselect.diffusion.network import Site
from mmaselect.diffusion.noise import DDPM
from mmaselect.diffusion.taps import Tap

#: Of a transformer block. Keys and values of the cross-attention are the prompt's, not the image's.
PARTS = {
    'self-q': 'attn1.to_q', 'self-k': 'attn1.to_k', 'self-v': 'attn1.to_v', 'cross-q': 'attn2.to_q',
    'ffn-inner': 'ff.net.0', 'out': '',
}  # fmt: skip


class UNetFamily(Family):
    """A block, as taps count, is a residual unit and the attention behind it, or what changes the size.

    Taps have the names of GDF (arXiv 2410.03558).
    """

    process_class = DDPM
    sites, auto_components = {}, ()
    latent_name, folder = 'sample', 'unet'

    @classmethod
    def units(cls, network: DiffusersModule) -> list[tuple[str, dict[str, Site]]]:
        """The units in the order of the pass, with the sites of each by the last part of GDF's names."""
        stages = [(f'down-level{n}', f'down_blocks.{n}', block) for n, block in enumerate(network.down_blocks)]
        stages.append(('mid', 'mid_block', network.mid_block))
        stages += [(f'up-level{n}', f'up_blocks.{n}', block) for n, block in enumerate(network.up_blocks)]
        units = [('unet', {'in': Site('conv_in', reads_input=True), 'after-conv-in': Site('conv_in')})]
        for name, path, block in stages:
            attentions = list(getattr(block, 'attentions', None) or ())
            for number in range(len(block.resnets)):
                resnet = f'{path}.resnets.{number}'
                sites = {'res-increment': Site(f'{resnet}.conv2'), 'res-out': Site(resnet)}
                if number < len(attentions) and attentions[number] is not None:
                    sites.update(cls.attention_sites(f'{path}.attentions.{number}', attentions[number]))
                units.append((f'{name}-repeat{number}', sites))
            for kind in ('downsampler', 'upsampler'):
                if getattr(block, f'{kind}s', None):
                    units.append((name, {f'{kind}-out': Site(f'{path}.{kind}s.0')}))
        return [*units, ('unet', {'out': Site('conv_out')})]

    @classmethod
    def attention_sites(cls, path: str, attention: DiffusersModule) -> dict[str, Site]:
        """Those of the transformer behind a residual unit."""
        sites = {}
        for number in range(len(attention.transformer_blocks)):
            block = f'{path}.transformer_blocks.{number}'
            for part, module in PARTS.items():
                sites[f'vit-block{number}-{part}'] = Site(f'{block}.{module}' if module else block)
            for kind, name in (('self', 'attn1'), ('cross', 'attn2')):
                layer, heads = f'{block}.{name}', attention.transformer_blocks[number].get_submodule(name).heads
                sites[f'vit-block{number}-{kind}-map'] = Site(f'{layer}.to_k', query=f'{layer}.to_q', heads=heads)
        return {**sites, 'vit-out': Site(path)}

    @classmethod
    def catalogue(cls, network: DiffusersModule) -> dict[Tap, Site]:
        """The sites of all units."""
        units = enumerate(cls.units(network))
        return {Tap(number, part): site for number, (_, sites) in units for part, site in sites.items()}

    @classmethod
    def tap_names(cls, config: Any) -> dict[str, Tap]:
        """GDF's names; of the middle, which has one transformer, it does not count them."""
        units = enumerate(cls.units(cls._network(config)))
        return {
            f'{"mid" if unit == "mid-repeat0" and part.startswith("vit") else unit}-{part}': Tap(number, part)
            for number, (unit, sites) in units
            for part in sites
        }

    @classmethod
    def blocks(cls, config: Any) -> list[str]:
        """None that repeats, as ``compile`` would need."""
        return []

    @classmethod
    def multiple(cls, config: Any) -> int:
        """Every level but the last halves the latent."""
        return 2 ** (len(config['block_out_channels']) - 1)
