# A five-block DiT on 16x16 grey pixels, trained on scikit-learn's digits without labels by configs/pretrain.
_base_ = ['linear.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='SiT', pretrained='mmaselect://dit-nano_digits', latent='pixels'),
        block=2,
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=128)],
    head=dict(in_channels=128),
)
