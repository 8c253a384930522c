# FLUX.1 dev: 19 double and 38 single blocks, 3072 wide. Block 28 is the tenth single one, which DiTF reads (arXiv
# 2505.18584).
_base_ = ['linear.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='Flux', pretrained='black-forest-labs/FLUX.1-dev', dtype='bfloat16'),
        block=28,
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=3072)],
    head=dict(in_channels=3072),
)
