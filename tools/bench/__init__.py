"""Step time and memory of LoSiA beside other ways to fine-tune, on one model, one batch and one thread count.

    python -m losia_fx.tools.bench --size small --out bench

All methods stand in one process and take turns, a step each a round, so that what disturbs the machine disturbs all of
them alike; what counts is the ratio to the floor of the same round.
"""
