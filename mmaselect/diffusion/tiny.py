"""Small autoencoders without attention: diffusers' ``AutoencoderTiny``, and the raw files of the TAESD project.

The raw files hold the tensors of a ``torch.nn.Sequential``; diffusers' ``EncoderTiny`` holds the same one under
``layers``. Some of them (TAEF2) have a pooling branch in their last blocks, which diffusers' block lacks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmaselect.diffusion.loading import Source, Tensors
from mmaselect.errors import InputError

#: Key of ``config.json``, ours: for the layers with a pooling branch, its channels.
POOLING = 'encoder_pooling_channels'


class PooledBlock(nn.Module):
    """A block of diffusers' encoder that first adds a pooling branch to its input.

    Args:
        block: The block.
        width: Channels of the block.
        channels: Channels of the branch.
    """

    def __init__(self, block: Any, width: int, channels: int) -> None:
        super().__init__()
        self.conv, self.skip, self.fuse = block.conv, block.skip, block.fuse
        self.pool = nn.Sequential(
            nn.Conv2d(width, channels, 1, bias=False),
            nn.GroupNorm(4, channels),
            nn.ReLU(),
            nn.Conv2d(channels, width, 1, bias=False),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        maps = maps + self.pool(maps)
        return self.fuse(self.conv(maps) + self.skip(maps))


def build_encoder(config: dict[str, Any]) -> nn.Module:
    """Builds diffusers' ``EncoderTiny``, with pooling branches where the config has them.

    Args:
        config: Of an ``AutoencoderTiny``, complete; optionally ``encoder_pooling_channels``, which maps the number of
            a layer to the channels of its branch.

    Raises:
        InputError: If it does not describe an encoder.
    """
    from diffusers.models.autoencoders.vae import EncoderTiny

    blocks, widths = config['num_encoder_blocks'], config['encoder_block_out_channels']
    if not isinstance(blocks, (list, tuple)) or len(blocks) != len(widths) or len(set(widths)) != 1:
        raise InputError(
            f'num_encoder_blocks={blocks!r}, encoder_block_out_channels={widths!r} are not of an AutoencoderTiny: give '
            'one entry per resolution, and all widths the same'
        )
    encoder = EncoderTiny(
        config['in_channels'], config['latent_channels'], tuple(blocks), tuple(widths), config['act_fn']
    )
    for layer, pooled in (config.get(POOLING) or {}).items():
        number = int(layer) if str(layer).isdecimal() else -1
        if not 0 <= number < len(encoder.layers) or isinstance(encoder.layers[number], nn.Conv2d):
            raise InputError(f'{POOLING} names layer {layer!r}: give numbers of blocks of the encoder')
        encoder.layers[number] = PooledBlock(encoder.layers[number], widths[0], pooled)
    return encoder


def find_raw(source: Source) -> Tensors | None:
    """Opens the ``*_encoder.pth`` of a folder without ``config.json``, or better the same as ``.safetensors``.

    None unless there is exactly one.
    """
    if source.folder is None or (not source.single and source.find('config.json') is not None):
        return None
    found = list(source.folder.glob(source.single or '*_encoder.*'))
    files = [file for file in found if file.name.endswith('_encoder.safetensors')]
    files = files or [file for file in found if file.name.endswith('_encoder.pth')]
    return Tensors(source, {None: files[0].name}) if len(files) == 1 else None


def raw_config(tensors: Tensors) -> dict[str, Any]:
    """Writes the ``config.json`` of a raw encoder from the names and shapes of its tensors, reading none of them.

    Raises:
        InputError: If they are not those of such an encoder.
    """
    shapes = tensors.shapes()
    try:
        convolutions = sorted(
            int(name.split('.')[0]) for name in shapes if name.endswith('.weight') and name.count('.') == 1
        )
        # Between two convolutions lie blocks; the last convolution makes the latent.
        blocks = [after - before - 1 for before, after in zip(convolutions, convolutions[1:])]
        first, last = (shapes[f'{index}.weight'] for index in (convolutions[0], convolutions[-1]))
        pooled = sorted(int(name.split('.')[0]) for name in shapes if name.endswith('.pool.0.weight'))
        return {
            '_class_name': 'AutoencoderTiny',
            'in_channels': first[1],
            'latent_channels': last[0],
            'num_encoder_blocks': blocks,
            'encoder_block_out_channels': [first[0]] * len(blocks),
            POOLING: {str(layer): shapes[f'{layer}.pool.0.weight'][0] for layer in pooled},
        }
    except (ValueError, IndexError, KeyError) as error:
        raise InputError(
            f'vae={tensors.source.name!r}: the tensors of {tensors.files[None]} are not those of a TAESD encoder'
        ) from error
