# Sana 1.6B: 20 blocks, 2240 wide, a cell for 32 pixels. Block 10 is the middle one.
_base_ = ['linear.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='Sana', pretrained='Efficient-Large-Model/Sana_1600M_512px_diffusers', dtype='bfloat16'),
        block=10,
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=2240)],
    head=dict(in_channels=2240),
)
