# Three timesteps, chosen for what each adds, in one map.
_base_ = ['dit-nano_linear_bs64-20e_digits-16px.py']

model = dict(
    backbone=dict(num_timesteps=3),
    neck=[
        dict(type='SoftmaxFusion', in_channels=128, num_maps=3),
        dict(type='GlobalAveragePooling'),
        dict(type='ClsBatchNormNeck', input_features=128),
    ],
)
