"""Training CALM on text (extra ``train``): data, presets, the loop, evaluation, sampling.

Data flows from :mod:`~calm_kernels.training.corpus` through
:mod:`~calm_kernels.training.data` to :mod:`~calm_kernels.training.blocks`;
:mod:`~calm_kernels.training.pipeline` builds the stages of a run from a preset of
:mod:`~calm_kernels.training.presets`; :mod:`~calm_kernels.training.stages` trains, scores and
reuses them with transformers' Trainer. Modules are imported where they are used: this one imports
nothing.
"""
