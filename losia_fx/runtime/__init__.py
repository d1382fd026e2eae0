"""What changes while a model trains: the subnets, and what is done around a forward and around an optimizer's step.

From the bottom: of one weight state.py and profile.py; whether S and W agree, evidence.py and agreement.py; of one
model train_state.py. Before a use: look.py, vigilance.py, and module_calls.py and outside.py where no graph of ours
runs. Around a step: step_hooks.py, steps.py and owners.py (whose it is), then step.py, measure.py, write_back.py and
slot.py. On top of all controller.py, which is what the user holds.
"""
