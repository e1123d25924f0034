"""`decotrain finetune`: local peers, or peers that join a run by address, fine-tune with SPSA.

`base` finds and loads the model, `task` is what its loss means, `worker` is a peer's process,
`job` what the launcher needs to know, `summary` what it all came to.
"""
