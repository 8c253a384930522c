# DIFT's: one activation of Stable Diffusion 2.1, averaged over 8 noises (arXiv 2306.03881).
_base_ = [
    '../_base_/models/matcher.py',
    '../_base_/datasets/spair_768.py',
    '../_base_/schedules/correspondence_10k.py',
    '../_base_/selection_recommended.py',
    '../_base_/correspondence_runtime.py',
]

model = dict(
    backbone=dict(
        diffusion=dict(type='UNet', pretrained='stabilityai/stable-diffusion-2-1', dtype='float16'),
        taps=['up-level1-upsampler-out'],
        timestep=261,
    ),
    ensemble=8,
    resolution=768,
)
