# PixArt-Sigma: 28 blocks, 1152 wide. Block 14 is the middle one.
_base_ = ['linear.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='PixArt', pretrained='PixArt-alpha/PixArt-Sigma-XL-2-512-MS', dtype='bfloat16'),
        block=14,
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=1152)],
    head=dict(in_channels=1152),
)
