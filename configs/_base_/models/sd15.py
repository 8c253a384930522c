# Stable Diffusion 1.5. What is read is of GDF's set (arXiv 2410.03558), its widest activation.
_base_ = ['linear.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='UNet', pretrained='stable-diffusion-v1-5/stable-diffusion-v1-5', dtype='bfloat16'),
        taps=['up-level1-repeat1-vit-block0-cross-q'],
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=1280)],
    head=dict(in_channels=1280),
)
