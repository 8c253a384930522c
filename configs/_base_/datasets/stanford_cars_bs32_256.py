# Stanford Cars: 196 models; 8,144 training and 8,041 test images.
_base_ = ['fgvc_bs32_256.py']

data_preprocessor = dict(num_classes=196)
train_dataloader = dict(dataset=dict(type='StanfordCars', data_root='data/Stanford_Cars', split='train'))
val_dataloader = dict(dataset=dict(type='StanfordCars', data_root='data/Stanford_Cars', split='test'))
test_dataloader = dict(dataset=dict(type='StanfordCars', data_root='data/Stanford_Cars', split='test'))
