# SiT-XL/2 at 256x256: DiT-XL/2's network. Its checkpoint is published in the original format only:
#   python tools/model_converters/dit_to_diffusers.py SiT-XL-2-256.pt checkpoints/SiT-XL-2-256
_base_ = ['dit-xl-2.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='SiT', pretrained='checkpoints/SiT-XL-2-256', vae='stabilityai/sd-vae-ft-ema'),
    ),
)
