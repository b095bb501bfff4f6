"""What sparsity costs in quality: attention, FFN, drift, the guard, and fine-tuning, measured on trained models.

`python -m benchmarks.quality` runs the parts one after the other and is resumable: each part leaves its figures as JSON under
`out/quality`, `report.py` turns them into docs/quality.md and its plots. Nothing is downloaded.
"""
