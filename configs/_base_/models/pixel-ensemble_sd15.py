# Stable Diffusion 1.5 with GDF's four activations at GDF's timestep; predictions at half the size, as GDF's.
_base_ = ['pixel-ensemble.py']

model = dict(
    backbone=dict(
        diffusion=dict(
            type='UNet',
            pretrained='stable-diffusion-v1-5/stable-diffusion-v1-5',
            dtype='float16',
            prompt='a photo of a horse',
        ),
        taps='gdf-sd15',
        timestep=50,
    ),
    decode_head=dict(in_channels=[1280, 1280, 640, 320], num_classes=21, stride=2),
)
