"""Persistent sparse kernels for GPUs, in Triton.

A folder a form: ``vectors`` for one stream at a time, ``slices`` and ``gates`` for several, ``products`` for the
input's half of a layer. In each, ``plan.py`` chooses sizes, ``layout.py`` arranges the weights for them, and
``kernel.py`` has the kernel and the function that launches it. ``forms.py`` chooses between ``slices`` and ``gates``.
What was measured stands in ``tuning.py``. Triton may be missing, so only functions that launch import ``kernel.py``.
"""
