# mmpretrain's schedule for CUB, its learning rate scaled from 64 to 128 images. DifFeed's own (SGD without momentum, 28
# epochs for ImageNet) is too short for a linear layer on a few thousand images: docs/en/runs.md compares them.
_base_ = ['mmpretrain::_base_/schedules/cub_bs64.py']

optim_wrapper = dict(optimizer=dict(lr=0.02))
train_cfg = dict(val_interval=10)
auto_scale_lr = dict(base_batch_size=128)
