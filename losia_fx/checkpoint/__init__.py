"""All that LoSiA adds to a training run, saved and loaded: plain functions, and transformers' Trainer."""
