"""The runner: plans and runs the notebooks of suite.yaml, here and on Kaggle, and reports what came out."""
