"""``AttentionPooling``: a map becomes a vector, by a class token that attends to its cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional

from mmaselect.errors import InputError, check_count, check_number


@MODELS.register_module()
class AttentionPooling(BaseModule):
    """The attention head of DifFeed (arXiv 2311.17921), up to its last layer, in the place of global average pooling.

    Each image's map is normalised over channels and cells together, projected to ``embed_dims``, and read by a class
    token through transformer blocks (pre-norm, GELU). The class token goes to an ordinary ``LinearClsHead``. There is
    no position embedding: maps of any size fit, and a permutation of the cells changes nothing.

    The defaults are those of DifFeed's released command line. Its norm has a weight for every channel and cell, which
    would fix the size of the map; here the projection takes their place.

    Args:
        in_channels: Channels of the map.
        embed_dims: Width of the blocks, and of the vector.
        num_heads: Attention heads.
        num_layers: Blocks.
        mlp_ratio: Width of a block's hidden layer over ``embed_dims``.
        dropout: In attention and hidden layers, in [0, 1).
        init_cfg: As in every OpenMMLab module.

    Raises:
        InputError: If the numbers do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int = 1024,
        num_heads: int = 8,
        num_layers: int = 2,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        counts = {'in_channels': in_channels, 'embed_dims': embed_dims, 'num_heads': num_heads}
        for name, value in (counts | {'num_layers': num_layers}).items():
            check_count(value, name)
        if embed_dims % num_heads:
            raise InputError(f'embed_dims={embed_dims} is not a multiple of num_heads={num_heads}')
        check_number(mlp_ratio, 'mlp_ratio', 0, open_low=True)
        check_number(dropout, 'dropout', 0, 1, open_high=True)
        self.projection = nn.Linear(in_channels, embed_dims)
        self.token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        hidden = round(embed_dims * mlp_ratio)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    embed_dims, num_heads, hidden, dropout, 'gelu', batch_first=True, norm_first=True
                )
                for _ in range(num_layers)
            )
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor]:
        """Pools.

        Args:
            maps: One tensor (B, C, h, w).

        Returns:
            One tensor (B, embed_dims).

        Raises:
            InputError: If there are more maps.
        """
        if len(maps) != 1:
            raise InputError(f'AttentionPooling takes one map, but {len(maps)} came in: fuse them with SoftmaxFusion')
        tokens = maps[0].flatten(2).transpose(1, 2)
        # Not nn.GroupNorm(1, C), which is the same: on the CPU its backward crashes (torch 2.13) where the input is
        # channels-last and needs no gradient, as maps of a frozen transformer are.
        tokens = self.projection(functional.layer_norm(tokens, tokens.shape[1:]))
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1)
        return (self.blocks(tokens)[:, 0],)
