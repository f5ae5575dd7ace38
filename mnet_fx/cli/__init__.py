"""The command line: `mnet-fx`, also `python -m mnet_fx`.

main.py      the commands, and what an error looks like
models.py    what MODEL can be
inputs.py    what --input can be
options.py   options that commands share; where what they say goes; progress
bench.py     a training step, timed and measured
demo.py      the tour
"""
