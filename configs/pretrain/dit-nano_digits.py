# python tools/dataset_converters/prepare_digits.py
# python tools/pretrain.py configs/pretrain/dit-nano_digits.py
_base_ = [
    '../_base_/models/flow-matching.py',
    '../_base_/datasets/digits_bs64_16.py',
    '../_base_/schedules/flow_matching_3k.py',
    '../_base_/pretrain_runtime.py',
]

model = dict(
    transformer=dict(
        num_layers=5,
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        sample_size=16,
        patch_size=2,
    ),
)
export_dir = 'mmaselect/assets/dit-nano_digits'
val_cfg = val_dataloader = val_evaluator = None
test_cfg = test_dataloader = test_evaluator = None
train_dataloader = dict(sampler=dict(type='InfiniteSampler'))
