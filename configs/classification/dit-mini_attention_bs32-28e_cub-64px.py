# Needs the model that configs/pretrain/dit-mini_cub-64px.py trains. DifFeed's attention head, as wide as the model, and
# half the usual batch: the subset that this model was trained on has few steps in an epoch.
_base_ = [
    '../_base_/models/dit-mini.py',
    '../_base_/datasets/cub_bs64_64.py',
    '../_base_/schedules/fgvc_attention_28e.py',
    '../_base_/selection_recommended.py',
    '../_base_/default_runtime.py',
]

model = dict(neck=[dict(type='AttentionPooling', in_channels=192, embed_dims=192)])
train_dataloader = dict(batch_size=32)
