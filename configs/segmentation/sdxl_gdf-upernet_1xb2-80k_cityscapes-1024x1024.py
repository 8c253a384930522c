# GDF's four activations of Stable Diffusion XL: strides 16 and 32.
_base_ = ['sd15_gdf-upernet_1xb2-80k_cityscapes-1024x1024.py']

model = dict(
    backbone=dict(diffusion=dict(pretrained='stabilityai/stable-diffusion-xl-base-1.0'), taps='gdf-sdxl'),
    neck=dict(in_channels=[1280, 1280, 640, 640], strides=[32, 32, 16, 16]),
    decode_head=dict(in_channels=[1280, 2560], in_index=[0, 1], pool_scales=(1, 2)),
    auxiliary_head=dict(in_channels=1280, in_index=0),
)
