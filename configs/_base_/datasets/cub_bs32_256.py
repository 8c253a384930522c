# CUB-200-2011: 200 species of birds; 5,994 training and 5,794 test images.
_base_ = ['fgvc_bs32_256.py']

data_preprocessor = dict(num_classes=200)
train_dataloader = dict(dataset=dict(type='CUB', data_root='data/CUB_200_2011', split='train'))
val_dataloader = dict(dataset=dict(type='CUB', data_root='data/CUB_200_2011', split='test'))
test_dataloader = dict(dataset=dict(type='CUB', data_root='data/CUB_200_2011', split='test'))
