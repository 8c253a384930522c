# DiT-XL/2 at 256x256: 28 blocks, 1152 wide, under the null class. Block 14 is its middle one.
# diffusers' format spaces the timestep's frequencies otherwise than the training did: timestep_freq_shift=0 in
# diffusion gives the features of the original checkpoint (docs/en/loading.md).
_base_ = ['linear.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='DiT', pretrained='facebook/DiT-XL-2-256', dtype='bfloat16'),
        block=14,
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=1152)],
    head=dict(in_channels=1152),
)
