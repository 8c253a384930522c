# Oxford Flowers-102: 2,040 images for training and validation, 6,149 test images.
_base_ = ['fgvc_bs32_256.py']

data_preprocessor = dict(num_classes=102)
train_dataloader = dict(dataset=dict(type='Flowers102', data_root='data/Flowers102', split='trainval'))
val_dataloader = dict(dataset=dict(type='Flowers102', data_root='data/Flowers102', split='test'))
test_dataloader = dict(dataset=dict(type='Flowers102', data_root='data/Flowers102', split='test'))
