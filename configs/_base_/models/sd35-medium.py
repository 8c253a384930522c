# Stable Diffusion 3.5 medium: 24 blocks, 1536 wide. Block 12 is a middle one, where the paper finds the best queries.
_base_ = ['linear.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='SD3', pretrained='stabilityai/stable-diffusion-3.5-medium', dtype='bfloat16'),
        block=12,
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=1536)],
    head=dict(in_channels=1536),
)
