# Linear probe: pooled query, batch norm without parameters (queries have no common scale), one linear layer.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ASelectDiT', component='query', timestep='auto'),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=None)],
    head=dict(
        type='LinearClsHead',
        in_channels=None,
        num_classes=None,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1,),
    ),
)
