# Stable Diffusion XL. What is read is of GDF's set (arXiv 2410.03558), its deepest activation.
_base_ = ['linear.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='UNet', pretrained='stabilityai/stable-diffusion-xl-base-1.0', dtype='bfloat16'),
        taps=['up-level0-repeat0-vit-block7-out'],
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=1280)],
    head=dict(in_channels=1280),
)
