"""What a training step will take, before it runs: bytes, operations, seconds; and what it took.

model, inputs --fake_call--> the same on tensors without memory        `faking`
plain, checkpoint per block, momentum --run--> every allocation noted  `ways`, `counting`
notes --> Way, Estimate --> table, advice, largest batch and depth     `estimates`, `advice`, `fitting`
"""
