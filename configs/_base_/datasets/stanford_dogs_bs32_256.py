# Stanford Dogs: 120 breeds; 12,000 training and 8,580 test images.
_base_ = ['fgvc_bs32_256.py']

data_preprocessor = dict(num_classes=120)
train_dataloader = dict(dataset=dict(type='StanfordDogs', data_root='data/stanford_dogs', split='train'))
val_dataloader = dict(dataset=dict(type='StanfordDogs', data_root='data/stanford_dogs', split='test'))
test_dataloader = dict(dataset=dict(type='StanfordDogs', data_root='data/stanford_dogs', split='test'))
