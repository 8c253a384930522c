# Three timesteps, chosen for what each adds, in one map.
_base_ = ['dit-micro_linear_bs64-100e_cub-32px.py']

model = dict(
    backbone=dict(num_timesteps=3),
    neck=[
        dict(type='SoftmaxFusion', in_channels=144, num_maps=3),
        dict(type='GlobalAveragePooling'),
        dict(type='ClsBatchNormNeck', input_features=144),
    ],
)
