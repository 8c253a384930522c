# Stable Diffusion 1.5 with GDF's four activations at GDF's timestep (arXiv 2410.03558).
_base_ = ['matcher.py']

model = dict(
    backbone=dict(
        diffusion=dict(
            type='UNet',
            pretrained='stable-diffusion-v1-5/stable-diffusion-v1-5',
            dtype='float16',
            prompt='a photo of an aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dog, horse, '
            'motorbike, person, potted plant, sheep, train or tv monitor, realistic',
        ),
        taps='gdf-sd15',
        timestep=50,
    ),
    resolution=512,
)
