# NABirds: 555 visual categories of birds; 23,929 training and 24,633 test images.
_base_ = ['fgvc_bs32_256.py']

data_preprocessor = dict(num_classes=555)
train_dataloader = dict(dataset=dict(type='NABirds', data_root='data/nabirds', split='train'))
val_dataloader = dict(dataset=dict(type='NABirds', data_root='data/nabirds', split='test'))
test_dataloader = dict(dataset=dict(type='NABirds', data_root='data/nabirds', split='test'))
