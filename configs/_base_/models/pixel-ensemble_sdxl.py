# Stable Diffusion XL with GDF's four activations; predictions at 256x256, as GDF's.
_base_ = ['pixel-ensemble_sd15.py']

model = dict(
    backbone=dict(diffusion=dict(pretrained='stabilityai/stable-diffusion-xl-base-1.0'), taps='gdf-sdxl'),
    decode_head=dict(in_channels=[1280, 1280, 640, 640], stride=4),
)
