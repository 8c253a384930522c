# Points found by the nearest neighbour of their features. Each image has a noise of its own: one noise for all would
# make cells of the same place alike, whatever they show.
model = dict(
    type='FeatureMatcher',
    data_preprocessor=dict(type='PairDataPreprocessor'),
    backbone=dict(type='ASelectDiT', noise='fresh'),
)
