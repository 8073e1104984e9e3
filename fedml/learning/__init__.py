"""Local training at a site: recipes, the training loop, its private form, evaluation.

Import from the modules: `recipe` loads no torch, the others do.
"""
