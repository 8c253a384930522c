# Stable Diffusion XL with GDF's four activations.
_base_ = ['matcher_sd15.py']

model = dict(
    backbone=dict(diffusion=dict(pretrained='stabilityai/stable-diffusion-xl-base-1.0'), taps='gdf-sdxl'),
)
