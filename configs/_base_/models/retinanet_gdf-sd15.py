# mmdet's RetinaNet on GDF's four activations of Stable Diffusion 1.5 (arXiv 2410.03558): strides 8, 16 and 32, and two
# more by FPN. The U-Net needs sides that are multiples of 64 pixels.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py']

model = dict(
    data_preprocessor=dict(pad_size_divisor=64),
    backbone=dict(
        _delete_=True,
        type='ASelectDiT',
        diffusion=dict(type='UNet', pretrained='stable-diffusion-v1-5/stable-diffusion-v1-5', dtype='float16'),
        taps='gdf-sd15',
        timestep=50,
        # As GDF has it. Images of another size get another fixed noise.
        noise='fresh',
    ),
    neck=[
        dict(
            type='ActivationAggregation',
            in_channels=[1280, 1280, 640, 320],
            strides=[32, 32, 16, 8],
            norm_cfg=dict(type='SyncBN'),
        ),
        dict(
            type='FPN',
            in_channels=[320, 640, 2560],
            out_channels=256,
            add_extra_convs='on_input',
            num_outs=5,
        ),
    ],
)
