# FGVC-Aircraft: 100 variants; 6,667 images for training and validation, 3,333 test images.
_base_ = ['fgvc_bs32_256.py']

data_preprocessor = dict(num_classes=100)
train_dataloader = dict(dataset=dict(type='FGVCAircraft', data_root='data/fgvc-aircraft-2013b', split='trainval'))
val_dataloader = dict(dataset=dict(type='FGVCAircraft', data_root='data/fgvc-aircraft-2013b', split='test'))
test_dataloader = dict(dataset=dict(type='FGVCAircraft', data_root='data/fgvc-aircraft-2013b', split='test'))
