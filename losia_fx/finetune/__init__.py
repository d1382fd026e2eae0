"""The work of ``losia-fx finetune``."""
