# A DiT in pixel space under its null class alone, trained by flow matching.
model = dict(
    type='FlowMatching',
    data_preprocessor=dict(
        type='mmpretrain.ClsDataPreprocessor', mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True
    ),
    transformer=dict(num_embeds_ada_norm=1),
)
