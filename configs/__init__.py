"""The checkpoints that come with the package: a folder each, with all that a Hub folder has but the code."""
