# DifFeed's released command line for its attention head (arXiv 2311.17921): plain SGD, a tenth after every 7 epochs.
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.05))
param_scheduler = [dict(type='StepLR', by_epoch=True, step_size=7, gamma=0.1)]
train_cfg = dict(by_epoch=True, max_epochs=28, val_interval=7)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=128)
